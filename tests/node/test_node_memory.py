"""A start that would run the machine out of memory is refused, with numbers and what to set."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from node import build
from node.config import NodeConfig
from wire.errors import ConfigError
from wire.types import Role

MIB = 1 << 20


def start(monkeypatch: pytest.MonkeyPatch, *, available: int, kv_memory: int = 0) -> None:
    monkeypatch.setattr(build, "available_memory", lambda: available)
    config = NodeConfig(Path(DEFAULT_MODEL), "n", kv_memory=kv_memory, dtype="float32")
    build.build_engine({Role.DECODE}, config, lambda stage, done, total: None)


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        r"too little memory: weights in float32 2\d\.\d+ MiB, work 256 MiB; available 100 MiB; "
        "free memory, set --dtype bfloat16, or take a smaller model"
    )
    with pytest.raises(ConfigError, match=expected):
        start(monkeypatch, available=100 * MIB)


def test_a_pool_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"--kv-cache-memory 2 GiB; .* to at most 7\d\dM"
    ) as error:
        start(monkeypatch, available=1024 * MIB, kv_memory=2048 * MIB)
    assert "\n" not in str(error.value)


def test_what_fits_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, available=512 * MIB, kv_memory=32 * MIB)
