"""The step loop around an engine that does what a test says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
import torch

from engine.engine import Engine
from engine.plan import LayerProgress, OnLayers, StepResult
from node import engine_thread
from node.engine_thread import EngineThread


class FakeEngine:
    """Has `work` steps to do; each first waits for `gate` where there is one."""

    def __init__(self) -> None:
        self.work = 0
        self.num_steps = 0
        self.fails = False
        self.error: Exception | None = None
        self.stuck = False
        self.gate: threading.Event | None = None
        self.in_step = threading.Event()
        self.step_request_ids: tuple[str, ...] = ()

    def has_work(self) -> bool:
        return self.work > 0

    def step(self, on_layers: OnLayers) -> StepResult | None:
        self.num_steps += 1
        self.step_request_ids = (f"r/{self.num_steps}",)
        self.in_step.set()
        if self.gate is not None:
            self.gate.wait(20)
        if self.fails:
            raise self.error or ArithmeticError(f"step {self.num_steps}")
        if self.stuck:
            return None
        self.work -= 1
        on_layers(LayerProgress(self.num_steps, ()))
        return StepResult(self.num_steps, (), 1, 0)


class Owner:
    """What the shell does with a thread, and what it hears."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.results: list[int] = []
        self.layers: list[LayerProgress] = []
        self.failures: list[tuple[str, tuple[str, ...]]] = []
        self.dead = False
        self.obituary = ""
        self.when_failing: Callable[[], None] = lambda: None
        self.thread = EngineThread(
            cast(Engine, self.engine),
            on_result=lambda result: self.results.append(result.step),
            on_layers=self.layers.append,
            on_failure=self._failed,
            on_death=self._died,
        )

    def _failed(self, error: Exception, request_ids: tuple[str, ...]) -> None:
        self.failures.append((str(error), request_ids))
        self.when_failing()

    def _died(self, reason: str) -> None:
        self.dead = True
        self.obituary = reason

    def give(self, work: int) -> None:
        self.engine.work += work
        self.thread.wake()


@asynccontextmanager
async def owner() -> AsyncIterator[Owner]:
    made = Owner()
    made.thread.start()
    try:
        yield made
    finally:
        if made.engine.gate is not None:
            made.engine.gate.set()
        await asyncio.to_thread(made.thread.stop)
        assert not made.thread.alive


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_results_come_in_order_and_the_thread_rests() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.give(50)
            await until(lambda: len(o.results) == 50)
            assert o.results == list(range(1, 51))
            assert [progress.num_layers for progress in o.layers] == o.results
            await asyncio.sleep(0.05)
            assert o.engine.num_steps == 50
            o.give(1)
            await until(lambda: len(o.results) == 51)

    asyncio.run(scenario())


def test_results_are_given_in_the_loop() -> None:
    async def scenario() -> None:
        async with owner() as o:
            threads: list[str] = []
            o.thread._on_result = lambda result: threads.append(threading.current_thread().name)
            o.give(1)
            await until(lambda: threads)
            assert threads == [threading.current_thread().name]

    asyncio.run(scenario())


def test_it_stops_when_idle_and_between_steps() -> None:
    async def scenario(work: int) -> None:
        async with owner() as o:
            o.engine.gate = threading.Event() if work else None
            o.give(work)
            if work:
                await asyncio.to_thread(o.engine.in_step.wait, 20)
                stopping = asyncio.create_task(asyncio.to_thread(o.thread.stop))
                await asyncio.sleep(0.02)
                assert not stopping.done(), "it waits for the step"
                assert o.engine.gate is not None
                o.engine.gate.set()
                await stopping
                assert o.engine.num_steps == 1

    for work in (0, 10):
        asyncio.run(scenario(work))


def test_a_failed_step_is_told_with_its_requests() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.fails = True

            def give_up() -> None:
                o.engine.fails = False

            o.when_failing = give_up
            o.give(2)
            await until(lambda: len(o.results) == 2)
            assert o.failures == [("step 1", ("r/1",))]
            assert not o.dead

    asyncio.run(scenario())


def test_a_failure_is_handled_before_the_next_step() -> None:
    """Else a loop that is busy for a moment would find the engine dead of one bad request."""

    async def scenario() -> None:
        async with owner() as o:
            o.engine.fails = True
            o.engine.work = 1
            o.when_failing = lambda: setattr(o.engine, "work", 0)
            o.thread.wake()
            await asyncio.to_thread(o.engine.in_step.wait, 20)
            threading.Event().wait(0.3)  # blocks this loop, on purpose
            assert o.engine.num_steps == 1
            await until(lambda: o.failures)
            assert not o.dead

    asyncio.run(scenario())


def test_it_can_be_stopped_while_a_failure_waits_to_be_handled() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.fails = True
            o.engine.work = 1
            o.thread.wake()
            await asyncio.to_thread(o.engine.in_step.wait, 20)
            o.thread.stop()  # blocks this loop
            await until(lambda: o.failures)
            await asyncio.sleep(0)
            assert not o.dead

    asyncio.run(scenario())


def test_failing_at_every_step_is_death() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.fails = True
            o.give(1)
            await until(lambda: o.dead)
            assert len(o.failures) == engine_thread._MAX_FAILURES
            assert o.engine.num_steps == engine_thread._MAX_FAILURES

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nadvice"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
)
def test_a_lost_device_is_death_at_once(error: Exception) -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.fails, o.engine.error = True, error
            o.give(1)
            await until(lambda: o.dead)
            assert o.engine.num_steps == 1
            assert not o.failures, "the router gives its requests to others"
            assert o.obituary == f"the device is lost: {str(error).splitlines()[0]}"

    asyncio.run(scenario())


def test_work_that_cannot_run_is_looked_at_again() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.stuck = True
            o.give(1)
            await until(lambda: o.engine.num_steps >= 3)
            assert not o.results
            o.engine.stuck = False
            await until(lambda: o.results)

    asyncio.run(scenario())


def test_idleness_is_no_stall() -> None:
    """Also in the moment between new work and the thread's waking up."""

    async def scenario() -> None:
        async with owner() as o:
            o.give(1)
            await until(lambda: o.results)
            await asyncio.sleep(0.02)
            o.thread._last_progress -= 1000  # a long night
            o.engine.gate = threading.Event()
            o.engine.in_step.clear()
            o.give(1)
            assert o.thread.stalled_s < 100
            await asyncio.to_thread(o.engine.in_step.wait, 20)
            assert o.thread.stalled_s < 100

    asyncio.run(scenario())


def test_a_step_that_does_not_end_is_a_stall() -> None:
    async def scenario() -> None:
        async with owner() as o:
            o.engine.gate = threading.Event()
            o.give(1)
            await asyncio.to_thread(o.engine.in_step.wait, 20)
            first = o.thread.stalled_s
            await until(lambda: o.thread.stalled_s > first)
            o.thread.wake()
            assert o.thread.stalled_s > first, "to wake a thread that works changes nothing"
            o.engine.gate.set()
            await until(lambda: o.results)
            assert o.thread.stalled_s == 0

    asyncio.run(scenario())
