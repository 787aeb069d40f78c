"""Fixtures that make tiny models, once per test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine.tiny_models import ARCHITECTURES, save_random_model


@pytest.fixture(scope="session", autouse=True)
def _silence() -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of one of ARCHITECTURES."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = save_random_model(*ARCHITECTURES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make
