"""What the engine says in the middle of a step is true: those layers do not change any more."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.plan import LayerProgress
from engine.request import Request
from engine.runner import ModelRunner, _LayerCount, at_once
from wire.types import SamplingParams

BLOCK_SIZE = 4
PROMPT = [5 * i % 90 + 3 for i in range(22)]


class Bench:
    """An engine over a tiny real model, and what it reports."""

    def __init__(self, folder: Path, marks: frozenset[int] | None = None) -> None:
        loaded = load_model(folder, dtype="float32")
        self.store = KVStore(loaded.kv_layout(BLOCK_SIZE), 32)
        self.store.blocks.zero_()
        config = EngineConfig(
            block_size=BLOCK_SIZE, num_blocks=32, max_model_len=64, max_num_batched_tokens=8
        )
        runner = ModelRunner(loaded, self.store)
        self.engine = Engine(
            config, runner, epoch=1, model_fingerprint="m", eos_token_ids=frozenset()
        )
        self.num_layers = loaded.kv_layout(BLOCK_SIZE).num_layers
        self.engine.layer_marks = frozenset(range(1, self.num_layers)) if marks is None else marks
        self.seen: list[tuple[LayerProgress, torch.Tensor]] = []

    def add(self, name: str, *, prefill_only: bool = True) -> None:
        sampling = SamplingParams(max_tokens=4)
        limit = len(PROMPT) + 4
        request = Request(name, list(PROMPT), len(PROMPT), sampling, limit)
        request.prefill_only = prefill_only
        self.engine.add(request)

    def look(self, progress: LayerProgress) -> None:
        self.seen.append((progress, self.store.blocks.clone()))


@pytest.fixture(params=["llama", "gemma2"])
def folder(request: pytest.FixtureRequest, make_model: Callable[[str], Path]) -> Path:
    return make_model(request.param)


def test_what_is_reported_is_final(folder: Path) -> None:
    bench = Bench(folder)
    bench.add("a")
    num_reports = 0
    while bench.engine.has_work():
        result = bench.engine.step(bench.look)
        assert result is not None
        (progress,) = result.progress
        finished = ((progress.request_id, progress.finished_blocks),)
        assert [seen.num_layers for seen, _ in bench.seen] == list(range(1, bench.num_layers))
        for seen, before in bench.seen:
            assert seen.finished_blocks == finished
            ids = [handle.block_id for _, handle in progress.finished_blocks]
            done = slice(seen.num_layers)
            assert torch.equal(before[ids, done], bench.store.blocks[ids, done])
            assert before[ids, done].abs().amax(dim=(2, 4, 5))[:, :, 0].all(), "first slots"
        num_reports += len(bench.seen)
        bench.seen.clear()
    assert num_reports == 3 * (bench.num_layers - 1), "22 tokens, 8 a step"


def test_nobody_is_told_what_nobody_asked_for(folder: Path) -> None:
    quiet = Bench(folder, marks=frozenset())
    quiet.add("a")
    quiet.engine.step(quiet.look)
    assert not quiet.seen
    decoding = Bench(folder)
    decoding.add("a", prefill_only=False)
    decoding.engine.step(decoding.look)
    assert not decoding.seen, "no handoff waits for these blocks"


def test_a_layer_that_comes_early_counts_for_nothing() -> None:
    told: list[int] = []
    count = _LayerCount(told.append, at_once)
    for layer in (0, 2, 1, 3):
        count(layer)
    assert told == [1, 2]


def test_on_a_device_a_layer_counts_once_the_device_has_done_it() -> None:
    told: list[int] = []
    waiting: list[Callable[[], None]] = []

    def when_done(tell: Callable[[int], None], num_layers: int) -> None:
        waiting.append(partial(tell, num_layers))

    count = _LayerCount(told.append, when_done)
    for layer in (0, 1):
        count(layer)
    assert told == []
    for done in waiting:
        done()
    assert told == [1, 2]
