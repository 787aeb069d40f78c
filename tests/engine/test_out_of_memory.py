"""A step that does not fit into the device's memory is tried again smaller, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.step_budget import PATIENCE, StepBudget
from tests.engine.hash_runner import HashRunner, expected_output
from wire.types import SamplingParams

NUM_BLOCKS = 64
FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)
"""Torch's allocator, and a library that has memory of its own."""


class SmallDevice:
    """Computes steps of at most `room` tokens."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tried: list[int] = []
        self._inner = HashRunner(NUM_BLOCKS, 4)

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        self.tried.append(plan.num_tokens)
        if plan.num_tokens > self.room:
            raise FULL[len(self.tried) % 2]
        return self._inner.run(plan, on_layers, on_hidden, sampled)


def engine_on(runner: SmallDevice) -> Engine:
    config = EngineConfig(
        block_size=4,
        num_blocks=NUM_BLOCKS,
        max_model_len=40,
        max_num_seqs=8,
        max_num_batched_tokens=32,
    )
    return Engine(config, runner, epoch=5, model_fingerprint="m", eos_token_ids=frozenset())


def request(number: int) -> Request:
    tokens = [(number + 5 * i) % 23 for i in range(9 + number)]
    sampling = SamplingParams(max_tokens=6, seed=number, ignore_eos=True)
    return Request(str(number), tokens, len(tokens), sampling, len(tokens) + 6)


def run_all(engine: Engine, num: int) -> tuple[dict[str, list[int]], list[StepResult]]:
    for number in range(num):
        engine.add(request(number))
    told: dict[str, list[int]] = {}
    results = []
    while engine.has_work():
        result = engine.step()
        assert result is not None
        results.append(result)
        engine._scheduler.check_integrity()
        for progress in result.progress:
            assert progress.index == len(told.setdefault(progress.request_id, []))
            told[progress.request_id] += progress.new_tokens
    return told, results


@pytest.mark.parametrize("room", [1, 3, 7, 20])
def test_requests_get_their_tokens_on_a_device_that_is_too_small(room: int) -> None:
    device = SmallDevice(room)
    told, results = run_all(engine_on(device), 6)
    assert told == {str(n): expected_output(request(n), frozenset())[0] for n in range(6)}
    assert device.tried[0] == 32
    assert sum(result.num_retries for result in results) == sum(n > room for n in device.tried)
    assert max(device.tried[6:]) <= max(room, 2 * room - 1)


def test_requests_beyond_the_seats_are_preempted_not_dropped() -> None:
    device = SmallDevice(32)
    engine = engine_on(device)
    for number in range(6):
        engine.add(request(number))
    while engine.load().num_waiting:
        engine.step()
    device.room = 2
    result = engine.step()
    assert result is not None
    assert result.num_retries
    assert engine.load().num_running <= 2
    assert engine.load().num_running + engine.load().num_waiting == 6
    finished = set()
    while engine.has_work():
        result = engine.step()
        assert result is not None
        finished |= {p.request_id for p in result.progress if p.finish_reason}
    assert finished == {str(number) for number in range(6)}


def test_one_token_that_does_not_fit_is_an_error() -> None:
    engine = engine_on(SmallDevice(0))
    engine.add(request(0))
    with pytest.raises(RuntimeError) as error:
        engine.step()
    assert error.value in FULL
    assert engine.abort("0")
    assert not engine.has_work()
    engine._scheduler.check_integrity()


def test_after_a_while_larger_steps_are_tried_again() -> None:
    budget = StepBudget(100)
    assert budget.did_not_fit(80)
    assert budget.now == 40
    for _ in range(PATIENCE):
        assert budget.now == 40
        budget.fitted()
    assert budget.now == 80
    for _ in range(PATIENCE):
        budget.fitted()
    assert budget.now == 100
    assert budget.did_not_fit(3)
    assert budget.now == 1
    assert not budget.did_not_fit(1)
    assert budget.did_not_fit(7, least=5)
    assert budget.now == 5, "beams that go together"
    assert not budget.did_not_fit(5, least=5)
