"""Engines of one machine, and what a measured fleet adds: times that can be computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.simulation.clock import Action, VirtualClock
from baton.simulation.machine import SharedMachine
from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import simulate
from engine.config import EngineConfig
from tuner.latency import LatencyModel
from tuner.overheads import Overheads
from tuner.trace import Trace, TracedRequest
from wire.geometry import geometry_for
from wire.layout import KVLayout

MODEL = LatencyModel((0.010, 1e-3, 0.0), (0.008, 1e-6, 1e-3), (0.1, 0.0))
SMALL = KVLayout(2, 2, 16, 16, "float32")
LARGE = KVLayout(12, 4, 64, 16, "float32")
ENGINE = EngineConfig(
    num_blocks=400, max_model_len=4096, max_num_seqs=16, max_num_batched_tokens=256
)
SETUP = Setup(Split(prefill=1, decode=1), ENGINE, SMALL, MODEL, hop_s=0.001)


def one(input_len: int, output_len: int) -> Trace:
    return Trace("made", (TracedRequest(0.0, input_len, output_len),))


def test_two_at_once_take_longer_while_both_compute() -> None:
    clock = VirtualClock()
    machine = SharedMachine(clock)
    ends: dict[str, float] = {}
    start = {"long": (0.0, 10.0, 2.0), "short": (5.0, 2.0, 1.5)}
    for name, (at, seconds, slowdown) in start.items():

        def done(name: str = name) -> None:
            ends[name] = clock.now

        def begin(
            seconds: float = seconds, slowdown: float = slowdown, done: Action = done
        ) -> None:
            machine.compute(seconds, slowdown, done)

        clock.at(at, begin)
    while clock.step():
        pass
    assert ends["short"] == pytest.approx(5.0 + 2.0 * 1.5)
    assert ends["long"] == pytest.approx(10.0 + 3.0 / 2.0)  # in 3 s it did half of 3 s' work


def test_what_is_done_may_begin_again_at_once() -> None:
    clock, ends = VirtualClock(), []
    machine = SharedMachine(clock)

    def again() -> None:
        ends.append(clock.now)
        if len(ends) < 3:
            machine.compute(1.0, 9.0, again)

    machine.compute(1.0, 9.0, again)
    while clock.step():
        pass
    assert ends == pytest.approx([1.0, 2.0, 3.0])  # never slowed down by itself


def test_overheads_come_on_top() -> None:
    bare, over = (
        simulate(replace(SETUP, overheads=overheads), one(100, 5)).records[0]
        for overheads in (Overheads(), Overheads(0.05, 0.03, 0.002, 0.001, 2.0))
    )
    assert bare.ttft is not None
    assert bare.tpot is not None
    assert over.ttft == pytest.approx(bare.ttft + 0.05 + 0.010 + 0.1)
    assert over.tpot == pytest.approx(bare.tpot + 0.03 / 4 + 0.003)


@pytest.mark.parametrize("split", [Split(prefill=1, decode=1), Split(mixed=2)])
def test_a_shared_machine_delays_and_loses_nothing(split: Split) -> None:
    requests = tuple(TracedRequest(i / 4, 150, 20) for i in range(40))
    runs = [
        simulate(replace(SETUP, split=split, overheads=overheads), Trace("made", requests)).records
        for overheads in (Overheads(), Overheads(prefill_slowdown=1.5, decode_slowdown=1.5))
    ]
    assert all(record.error is None for run in runs for record in run)
    alone, shared = (sum(record.e2e for record in run) for run in runs)
    assert alone < shared < 2 * alone


def test_steps_of_a_machine_nobody_shares_take_as_long_as_skipped_ones() -> None:
    """A slowdown for the prefill alone, which nothing slows: steps are made one by one."""
    skipped = simulate(SETUP, one(100, 50)).records[0]
    made = simulate(replace(SETUP, overheads=Overheads(prefill_slowdown=2.0)), one(100, 50))
    assert made.records[0].e2e == pytest.approx(skipped.e2e)


def test_slices_leave_while_the_next_layers_compute() -> None:
    groups = geometry_for(LARGE).num_layer_groups
    assert groups > 1
    whole, sliced = (
        simulate(replace(SETUP, layout=layout), one(200, 2)).records[0] for layout in (SMALL, LARGE)
    )
    assert whole.tpot is not None
    assert sliced.tpot is not None
    prefill, transfer = 0.010 + 200e-3, 0.1
    assert sliced.tpot == pytest.approx(whole.tpot - transfer + transfer / groups)
    assert transfer < prefill * (groups - 1) / groups  # else the link would be what lasts
