"""A node with a head that drafts: what it has, and what it says of one that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.bundled_model import DEFAULT_MODEL
from engine.drafting.config import SpeculativeConfig
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from node.build import build_engine
from node.config import NodeConfig
from node.drafting import load_drafter
from tests.engine.tiny_heads import save_eagle, save_eagle_for_bundled
from wire.errors import ConfigError
from wire.types import Role, SamplingParams


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_eagle_for_bundled(tmp_path_factory.mktemp("node") / "head")


def nothing(*_: object) -> None:
    """Nobody is told."""


def config_of(method: str, folder: Path | None, **settings: Any) -> NodeConfig:
    speculative = SpeculativeConfig(method, folder)
    return NodeConfig(DEFAULT_MODEL, "node", speculative=speculative, **settings)


def refused(config: NodeConfig, model: LoadedModel) -> str:
    with pytest.raises(ConfigError) as caught:
        load_drafter(config, model, nothing, nothing)
    assert str(caught.value).startswith("--speculative-config: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be(model: LoadedModel, head: Path, tmp_path: Path) -> None:
    assert "there is no model folder" in refused(config_of("eagle", tmp_path / "no"), model)
    other = save_eagle(tmp_path / "other", vocab_size=4096)
    assert "states of 32 numbers, the model's have 256" in refused(config_of("eagle", other), model)
    assert "no layers that predict next tokens" in refused(config_of("mtp", None), model)
    tokenizer = json.loads((DEFAULT_MODEL / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"].popitem()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another vocabulary" in refused(config_of("eagle", other), model)


def test_too_little_memory_for_both(head: Path) -> None:
    config = config_of("eagle", head, kv_memory=70_000)
    with pytest.raises(ConfigError, match="of the draft model; give more"):
        build_engine({Role.DECODE}, config, nothing)


def test_a_built_node_drafts_with_it(head: Path) -> None:
    """Its blocks, and those of the head, are in the memory that was given."""
    memory = 8 << 20
    built = build_engine({Role.DECODE}, config_of("eagle", head, kv_memory=memory), nothing)
    assert built.num_blocks * built.layout.block_bytes * 9 // 8 <= memory
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    built.engine.add(Request("r", list(range(5, 30)), 25, sampling, 100))
    drafted = 0
    while built.engine.has_work():
        result = built.engine.step()
        assert result is not None
        assert result.speculation is not None
        assert not result.speculation.failure
        drafted += sum(number for number, _ in result.speculation.drafts)
    assert drafted > 0
