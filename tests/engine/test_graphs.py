"""Padded decode steps from shared buffers give what plain ones give; captures may fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.drafting.draft_model import DraftModel
from engine.drafting.drafter import Ask
from engine.engine import Engine
from engine.flat_batch import FlatBatch, flatten
from engine.graphs import Capture, EagerCapture, Replay, can_replay, ladder, rung_for
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.step_inputs import HostRequests, Sizes, StepInputs, fill, host_buffer, sizes_of
from kernels.triton_ops import TritonOps
from wire.types import SamplingParams

BLOCK_SIZE = 4
NUM_BLOCKS = 64
MAX_LEN = 40
CPU = torch.device("cpu")


def request(name: str, num_tokens: int, seed: int = 0, temperature: float = 0.0) -> Request:
    tokens = [(7 * i + 3 * seed + 1) % 90 for i in range(num_tokens)]
    sampling = SamplingParams(seed=seed, max_tokens=9, temperature=temperature, ignore_eos=True)
    return Request(name, tokens, num_tokens, sampling, num_tokens + 9)


def test_the_ladder_has_small_steps_for_small_batches_and_ends_at_the_most_seats() -> None:
    assert ladder(1) == (1,)
    assert ladder(3) == (1, 2, 3)
    assert ladder(33) == (1, 2, 4, 8, 16, 24, 32, 33)
    assert ladder(320)[-4:] == (248, 256, 288, 320)


@pytest.mark.parametrize(("num", "rung"), [(1, 1), (3, 4), (4, 4), (9, 16), (17, None)])
def test_a_step_takes_the_smallest_rung_that_holds_it(num: int, rung: int | None) -> None:
    assert rung_for(num, (1, 2, 4, 8, 16)) == rung


def test_a_step_that_fits_no_rung_is_not_replayed_without_rungs() -> None:
    assert rung_for(1, ()) is None


def decode_plan(*lengths: int) -> StepPlan:
    items = []
    for number, length in enumerate(lengths):
        made = request(str(number), length)
        made.block_table = [10 * number + i for i in range(-(-length // BLOCK_SIZE))]
        items.append(ScheduledRequest(made, length - 1, 1))
    return StepPlan(tuple(items))


def test_only_steps_that_decode_are_replayed() -> None:
    assert can_replay(decode_plan(3, 4))
    chunk = ScheduledRequest(request("p", 6), 0, 6)
    assert not can_replay(StepPlan((*decode_plan(3).scheduled, chunk)))
    unfinished = ScheduledRequest(request("p", 6), 0, 1)  # gives no logits
    assert not can_replay(StepPlan((unfinished,)))


def inputs_of(flat: FlatBatch, sizes: Sizes, scratch: int = 63) -> StepInputs:
    buffer = host_buffer(sizes.starts[-1], CPU)
    buffer.fill_(-7)  # what nobody writes must not be read
    fill(buffer.numpy(), sizes, flat, scratch)
    return StepInputs.of(buffer, sizes, max_rows=1, max_context=MAX_LEN)


def test_padding_rows_write_to_the_scratch_block_and_read_nothing() -> None:
    flat = flatten(decode_plan(5, 9, 1), BLOCK_SIZE)
    inputs = inputs_of(flat, Sizes(8, 8, 8, len(flat.tables)))
    assert inputs.token_ids.tolist()[3:] == [0] * 5
    blocks, offsets = inputs.slots
    assert blocks.tolist() == [1, 12, 20, 63, 63, 63, 63, 63]
    assert offsets.tolist()[:3] == [0, 0, 0]
    assert inputs.rows.context_len.tolist() == [5, 9, 1, 0, 0, 0, 0, 0]
    assert inputs.rows.first_row.tolist() == list(range(9))
    assert inputs.needed_rows.tolist() == list(range(8))
    tables = [r.block_table.tolist() for r in HostRequests(inputs.rows)]
    assert tables == [[0, 1], [10, 11, 12], [20]]


def test_a_step_of_chunks_needs_no_padding() -> None:
    first, second = request("a", 6), request("b", 9)
    first.block_table, second.block_table = [3, 4], [5, 6, 7]
    plan = StepPlan((ScheduledRequest(first, 4, 2), ScheduledRequest(second, 0, 9)))
    flat = flatten(plan, BLOCK_SIZE)
    sizes = sizes_of(flat)
    inputs = inputs_of(flat, sizes)
    assert inputs.rows.first_row.tolist() == [0, 2, 11]
    assert inputs.rows.context_len.tolist() == [6, 9]
    assert inputs.needed_rows.tolist() == [1, 10]
    assert np.array_equal(inputs.positions.numpy(), flat.positions)
    assert all(start % 4 == 0 for start in sizes.starts)  # 16 bytes


# ---------------------------------------------------------------- whole engines


class FailingCapture:
    """CUDA's graphs on a bad day: the third capture fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self._left = 2

    def capture(self, work: Callable[[], object]) -> Replay:
        if not self._left:
            raise self._error
        self._left -= 1
        return EagerCapture().capture(work)


@pytest.fixture(scope="module")
def llama(make_model: Callable[[str], Path]) -> LoadedModel:
    return load_model(make_model("llama"), max_model_len=MAX_LEN)


def engine_on(
    loaded: LoadedModel, capture: Capture | None, *, packed: bool, lookahead: bool = False
) -> tuple[Engine, ModelRunner]:
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS + 1)
    store.blocks.fill_(float("nan"))  # an unwritten slot that is read shows at once
    runner = ModelRunner(loaded, store, packed=packed)
    if capture is not None:
        runner.capture(ladder(8), MAX_LEN, capture, scratch=NUM_BLOCKS)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        lookahead=lookahead,
    )
    engine = Engine(
        config,
        runner,
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(),
        ops=loaded.ops,
    )
    return engine, runner


def tokens_of(engine: Engine, num_requests: int = 7) -> dict[str, list[int]]:
    """Requests that come and go, chunked prompts beside decoding ones."""
    told: dict[str, list[int]] = {}
    for number in range(num_requests):
        engine.add(request(str(number), 5 + 3 * number, number, number % 2))
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert not result.corrupted
        for progress in result.progress:
            told.setdefault(progress.request_id, []).extend(progress.new_tokens)
    return told


def test_replayed_steps_give_the_tokens_of_plain_ones(llama: LoadedModel) -> None:
    plain, _ = engine_on(llama, None, packed=False)
    expected = tokens_of(plain)
    assert all(len(tokens) == 9 for tokens in expected.values())
    packed, _ = engine_on(llama, None, packed=True)
    assert tokens_of(packed) == expected
    replayed, runner = engine_on(llama, EagerCapture(), packed=True)
    assert runner.graphs is not None
    assert runner.graphs.rungs == (1, 2, 4, 8)
    assert tokens_of(replayed) == expected


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("capture", [None, EagerCapture()])
def test_steps_launched_ahead_give_the_tokens_of_plain_ones(
    llama: LoadedModel, packed: bool, capture: Capture | None
) -> None:
    plain, _ = engine_on(llama, None, packed=False)
    ahead, _ = engine_on(llama, capture, packed=packed, lookahead=True)
    assert tokens_of(ahead) == tokens_of(plain)


def test_kernels_of_a_gpu_take_padded_steps(llama: LoadedModel) -> None:
    """In Triton's interpreter, where there is no GPU."""
    warnings: list[str] = []
    on_kernels = replace(llama, ops=TritonOps(warn=warnings.append))
    plain, _ = engine_on(llama, None, packed=False)
    expected = tokens_of(plain, 3)
    replayed, _ = engine_on(on_kernels, EagerCapture(), packed=True)
    assert tokens_of(replayed, 3) == expected
    if not torch.cuda.is_available():
        assert not warnings, "every case has its kernel"


def test_every_step_that_decodes_is_replayed(llama: LoadedModel) -> None:
    engine, runner = engine_on(llama, EagerCapture(), packed=True)
    assert runner.graphs is not None
    seen: list[int] = []

    def watched(rung: int, replay: Replay) -> Replay:
        def noted() -> None:
            seen.append(rung)
            replay()

        return noted

    replays = runner.graphs._replays
    replays.update({rung: watched(rung, replay) for rung, replay in replays.items()})
    engine.add(request("a", 3))
    engine.add(request("b", 5))
    engine.add(request("c", 4))
    while engine.has_work():
        engine.step()
    assert seen == [4] * 8  # the first of nine tokens came with the prompts


@pytest.mark.parametrize("error", [RuntimeError("no graph"), torch.OutOfMemoryError("no room")])
def test_what_was_not_captured_runs_without_a_graph(
    llama: LoadedModel, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    plain, _ = engine_on(llama, None, packed=False)
    engine, runner = engine_on(llama, FailingCapture(error), packed=True)
    assert runner.graphs is not None
    assert runner.graphs.num_failed == 1
    assert runner.graphs.rungs == (4, 8)  # the largest come first
    assert "no graph of 2 requests" in caplog.text
    assert tokens_of(engine) == tokens_of(plain)
    nothing, none = engine_on(llama, FailingCaptureAtOnce(), packed=True)
    assert none.graphs is not None
    assert none.graphs.rungs == ()
    assert tokens_of(nothing) == tokens_of(plain)


class FailingCaptureAtOnce:
    """No capture works."""

    def capture(self, work: Callable[[], object]) -> Replay:
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_model_that_is_not_fused_has_no_graphs(make_model: Callable[[str], Path]) -> None:
    loaded = load_model(make_model("llama"), max_model_len=MAX_LEN, fusing=False)
    engine, runner = engine_on(loaded, EagerCapture(), packed=True)
    assert runner.graphs is None
    assert len(tokens_of(engine)) == 7


class OutOfMemoryOnce:
    """A runner whose device is full at its n-th step."""

    def __init__(self, runner: ModelRunner, step: int) -> None:
        self._runner, self._left = runner, step

    def run(self, plan: StepPlan) -> Tensor:
        self._left -= 1
        if not self._left:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._runner.run(plan)


def drafts_of(loaded: LoadedModel, capture: Capture | None, full_at: int = 0) -> list[list[int]]:
    """Of three requests, one after the other; the target takes all of them."""
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS + 1)
    runner = ModelRunner(loaded, store, packed=True)
    if capture is not None:
        runner.capture(ladder(4), MAX_LEN, capture, scratch=NUM_BLOCKS)
    drafter = DraftModel(
        cast(ModelRunner, OutOfMemoryOnce(runner, full_at)),
        Sampler(frozenset()),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
    )
    requests = [request(str(number), 4 + number, number, number % 2) for number in range(3)]
    drafts = []
    for _ in range(3):
        found = drafter.propose([Ask(r, 3) for r in requests])
        for each, draft in zip(requests, found, strict=True):
            each.tokens += draft
            drafter.accepted(each, len(draft))
            each.tokens.append(7)
        drafts += [list(draft) for draft in found]
        drafter.check_integrity()
    return drafts


def test_a_draft_models_passes_are_replayed(llama: LoadedModel) -> None:
    expected = drafts_of(llama, None)
    assert all(len(draft) == 3 for draft in expected)
    counted = CountingCapture()
    assert drafts_of(llama, counted) == expected
    assert counted.num_replays == 3 * 2, "all but the first of each draft, which catches up"


class CountingCapture:
    """EagerCapture that counts."""

    def __init__(self) -> None:
        self.num_replays = 0

    def capture(self, work: Callable[[], object]) -> Replay:
        def replay() -> None:
            self.num_replays += 1
            work()

        return replay


@pytest.mark.parametrize("full_at", [1, 2, 5])
def test_a_draft_that_does_not_fit_into_memory_is_none(llama: LoadedModel, full_at: int) -> None:
    drafts = drafts_of(llama, None, full_at)
    assert sorted(map(len, drafts)) == [0] * 3 + [3] * 6
