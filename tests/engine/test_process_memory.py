"""That packed weights give their pages back, and that nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.process_memory import MappedFiles, trim

SMAPS = Path("/proc/self/smaps")
SIZE = 1 << 20  # elements: 4 MiB

pytestmark = pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux' /proc")


def resident(path: Path) -> int:
    """KiB of this process's mapping of a file that are in memory."""
    parts = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", SMAPS.read_text())
    mine = [part for part in parts if str(path.resolve()) in part.split("\n", 1)[0]]
    return sum(int(re.findall(r"(?m)^Rss: +(\d+)", part)[0]) for part in mine)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.safetensors"
    save_file({"a": torch.full((SIZE,), 3.0), "b": torch.full((SIZE,), 5.0)}, file)
    return file


def test_pages_are_given_up_and_come_back_as_they_were(weights: Path) -> None:
    tensors = load_file(weights)
    assert (tensors["a"].sum(), tensors["b"].sum()) == (3 * SIZE, 5 * SIZE)
    before = resident(weights)
    assert before >= 2 * 4096
    MappedFiles([weights]).give_up([tensors["a"]])
    assert before - resident(weights) >= 4096 - 64  # borders are shared with the neighbours
    assert (tensors["a"].sum(), tensors["b"].sum()) == (3 * SIZE, 5 * SIZE)


def test_memory_of_no_file_is_left_alone(weights: Path) -> None:
    tensors = load_file(weights)
    own = torch.full((SIZE,), 7.0)
    MappedFiles([weights]).give_up([own])
    assert own.eq(7).all()
    changed = tensors["a"].fill_(9)  # written, so that its pages are no longer the file's
    MappedFiles([]).give_up([changed])
    assert changed.eq(9).all()


def test_without_proc_nothing_is_given_up(weights: Path, tmp_path: Path) -> None:
    tensors = load_file(weights)
    tensors["a"].fill_(9)
    MappedFiles([weights], maps=tmp_path / "missing").give_up([tensors["a"]])
    assert tensors["a"].eq(9).all()


def test_trim_does_no_harm() -> None:
    kept = torch.ones(1000)
    trim()
    assert kept.sum() == 1000
