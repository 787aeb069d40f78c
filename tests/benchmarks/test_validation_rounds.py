"""The rounds of `make validate-simulator`, on a fleet that is itself simulated at a known pace."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from statistics import mean

import pytest

from baton import profile_load
from baton.simulation.simulate import simulate
from benchmarks import validate_simulator
from benchmarks.planning.figures import Figures, Row, figures_of
from benchmarks.planning.real import setup_of, unloaded
from benchmarks.validate_simulator import FULL, SAMPLES, SPLIT, measure
from tuner.latency import LatencyModel
from tuner.overheads import Overheads
from tuner.profile import Profile
from tuner.record import RequestRecord
from tuner.trace import Trace
from wire.layout import KVLayout

URL = "http://made-up"
WORKLOADS = ["chats", "azure", "mooncake"]
NUM_ROUNDS = 2
PROBED = Profile(
    "made up",
    "1",
    "a machine",
    2048,
    KVLayout(2, 2, 16, 16, "float32"),
    LatencyModel((0.02, 1e-3, 3e-7), (0.025, 2e-6, 1e-3), (0.001, 1e-10)),
    {},
    Overheads(front_s=0.003, handoff_s=0.002, step_s=0.002),
)


def at_pace(factor: float) -> Profile:
    over = replace(PROBED.overheads, prefill_factor=factor, decode_factor=factor)
    return replace(PROBED, overheads=over)


def served(trace: Trace, factor: float) -> list[RequestRecord]:
    return simulate(setup_of(at_pace(factor), SPLIT), trace).records


@dataclass(frozen=True, slots=True)
class Call:
    """What the fleet was asked: its pace, or a workload."""

    name: str
    seed: int
    factor: float  # by which it was slower meanwhile


@dataclass(slots=True)
class Machine:
    """Stands for the bench and what asks its fleet; call n finds it slower by `pace(n)`."""

    pace: Callable[[int], float]
    model: Path = Path("made-up")
    up: bool = False
    calls: list[Call] = field(default_factory=list)
    traces: dict[str, Trace] = field(default_factory=dict)

    @contextmanager
    def fleet(self) -> Iterator[str]:
        self.up = True
        yield URL
        self.up = False

    def profile(self, url: str) -> Profile:
        assert (url, self.up) == (URL, True)
        return PROBED

    def called(self, name: str, url: str, seed: int) -> float:
        assert (url, self.up) == (URL, True)
        self.calls.append(Call(name, seed, self.pace(len(self.calls))))
        return self.calls[-1].factor

    def replay(self, url: str, trace: Trace, seed: int) -> list[RequestRecord]:
        assert self.traces.setdefault(trace.name, trace) == trace, "the same in each round"
        return served(trace, self.called(trace.name, url, seed))

    def under_load(self, *args: object, **kwargs: object) -> Overheads:
        told = signature(profile_load.under_load).bind(*args, **kwargs).arguments
        assert told["profile"] == PROBED, "each pace is found from what the probes found"
        return at_pace(self.called("pace", told["url"], told["seed"])).overheads

    def beside(self, name: str) -> list[float]:
        """The paces asked for just before and just after the workload's runs."""
        runs = [at for at, call in enumerate(self.calls) if call.name == name]
        neighbours = [self.calls[at + step] for at in runs for step in (-1, 1)]
        assert {call.name for call in neighbours} == {"pace"}
        return [call.factor for call in neighbours]

    def during(self, name: str) -> list[float]:
        """The paces at which the workload ran."""
        return [call.factor for call in self.calls if call.name == name]

    def figures(self, name: str, factors: list[float]) -> list[Figures]:
        trace = self.traces[name]
        slo = unloaded(setup_of(PROBED, SPLIT), trace)
        return [figures_of(served(trace, factor), slo) for factor in factors]


def measured(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> list[Row]:
    effort = replace(FULL, rounds=NUM_ROUNDS, seconds=10.0)
    monkeypatch.setattr(validate_simulator, "FULL", effort)
    monkeypatch.setattr(validate_simulator, "Bench", lambda *_: machine)
    monkeypatch.setattr(validate_simulator, "replay", machine.replay)
    monkeypatch.setattr(validate_simulator, "under_load", machine.under_load)
    files = {"azure": SAMPLES / "azure.csv", "mooncake": SAMPLES / "mooncake.jsonl"}
    return measure(argparse.Namespace(quick=False, model=machine.model, **files), Path("unused"))


def test_at_a_steady_pace_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = measured(monkeypatch, Machine(lambda _: 1.4))
    assert {row.workload for row in rows} == set(WORKLOADS)
    for row in rows:
        assert (row.error, row.spread, row.drift) == pytest.approx((0, 0, 0)), row


def test_workloads_take_turns_with_the_pace_asked_for_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(lambda _: 1.0)
    measured(monkeypatch, machine)
    in_turn = [name for workload in WORKLOADS for name in (workload, "pace")]
    assert [call.name for call in machine.calls] == ["pace", *in_turn * NUM_ROUNDS]
    seeds = [call.seed for call in machine.calls]
    assert len(set(seeds)) == len(seeds), "or a cache knows the prompts"


def test_runs_are_compared_with_the_paces_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda call: 1.0 + 0.003 * call**2)  # no two pairs with the same mean
    rows = measured(monkeypatch, machine)
    for workload in WORKLOADS:
        real = machine.figures(workload, machine.during(workload))
        simulated = machine.figures(workload, machine.beside(workload))
        for row in (row for row in rows if row.workload == workload):
            told = [figures[row.name] for figures in simulated]
            assert row.real == pytest.approx(mean(figures[row.name] for figures in real))
            assert row.simulated == pytest.approx(mean(told))
            assert row.drift * row.simulated == pytest.approx(max(told) - min(told))
