"""The model that follows live steps: it finds the machine's pace, and nothing drives it away."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.latency import LatencyModel
from tuner.live import BOUND, MAX_NODES, MEMORY_S, LiveModel, weighted_median
from wire.types import StepSums

PROFILE = LatencyModel((0.01, 2e-4, 3e-8), (0.008, 5e-7, 4e-4), (0.0004, 2e-9))


class Machine:
    """A node that counts; each report is of a second of steps, `slower` than the profile says."""

    def __init__(self, live: LiveModel, name: str = "node-0/1") -> None:
        self.live, self.name, self.now = live, name, 0.0
        self.prefill, self.decode = StepSums(), StepSums()
        self.random = random.Random(name)
        self.tell()

    def tell(self) -> None:
        self.live.report(self.name, self.prefill, self.decode, self.now)

    def second(self, prefill: float = 1.0, decode: float = 1.0) -> None:
        self.now += 1.0
        self.prefill = self._more(self.prefill, PROFILE.prefill, prefill)
        self.decode = self._more(self.decode, PROFILE.decode, decode)
        self.tell()

    def _more(self, sums: StepSums, formula: tuple[float, float, float], slower: float) -> StepSums:
        steps, tokens = self.random.randint(5, 20), self.random.randint(100, 4000)
        weight = self.random.randint(5, 300)
        took = slower * (formula[0] * steps + formula[1] * tokens + formula[2] * weight)
        return StepSums(
            sums.steps + steps, sums.tokens + tokens, sums.weight + weight, sums.seconds + took
        )


def test_it_finds_the_pace_of_each_formula() -> None:
    machine = Machine(LiveModel(PROFILE))
    for _ in range(60):
        machine.second(prefill=1.5, decode=0.8)
    found = machine.live.model(machine.now)
    assert found.prefill == pytest.approx([1.5 * value for value in PROFILE.prefill])
    assert found.decode == pytest.approx([0.8 * value for value in PROFILE.decode])
    assert found.transfer == PROFILE.transfer
    assert machine.live.factors(machine.now) == pytest.approx({"prefill": 1.5, "decode": 0.8})


def test_without_reports_and_with_few_the_profile_is_believed() -> None:
    live = LiveModel(PROFILE)
    assert live.model(0.0) == PROFILE
    machine = Machine(live)
    machine.second(prefill=3.0, decode=3.0)
    assert live.model(machine.now) == PROFILE


def test_a_change_is_followed_and_the_old_pace_forgotten() -> None:
    machine = Machine(LiveModel(PROFILE))
    for pace in (1.0, 2.0, 1.0):
        for _ in range(int(MEMORY_S)):
            machine.second(pace, pace)
        assert machine.live.factors(machine.now)["decode"] == pytest.approx(pace)
    machine.now += 2 * MEMORY_S
    assert machine.live.model(machine.now) == PROFILE


def test_outliers_move_nothing() -> None:
    """A third of the seconds are of a machine that swaps."""
    machine = Machine(LiveModel(PROFILE))
    for second in range(60):
        machine.second(*((1.2, 1.2) if second % 3 else (50.0, 50.0)))
    assert machine.live.factors(machine.now)["prefill"] == pytest.approx(1.2)


@pytest.mark.parametrize(("pace", "found"), [(100.0, BOUND), (0.1, 1 / BOUND)])
def test_it_does_not_run_away(pace: float, found: float) -> None:
    machine = Machine(LiveModel(PROFILE))
    for _ in range(100):
        machine.second(pace, 1.0)
    assert machine.live.factors(machine.now) == {"prefill": found, "decode": 1.0}


def test_what_was_counted_before_the_first_report_says_nothing() -> None:
    live = LiveModel(PROFILE)
    live.report("old/1", StepSums(10**6, 10**9, 10**9, 1e6), StepSums(), 0.0)
    assert live.model(0.0) == PROFILE


def test_a_node_that_counts_anew_is_a_new_one() -> None:
    machine = Machine(LiveModel(PROFILE))
    for _ in range(30):
        machine.second(1.3, 1.3)
    machine.prefill = machine.decode = StepSums()
    machine.tell()
    for _ in range(5):
        machine.second(1.3, 1.3)
    assert machine.live.factors(machine.now)["prefill"] == pytest.approx(1.3)


def test_only_so_many_nodes_are_remembered() -> None:
    live = LiveModel(PROFILE)
    for number in range(MAX_NODES + 100):
        live.report(f"{number}/1", StepSums(), StepSums(), 0.0)
    assert len(live._counts) == MAX_NODES


SUMS = st.builds(
    StepSums, st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63), st.floats(0, 1e9)
)


@given(st.lists(st.tuples(SUMS, SUMS), max_size=20))
def test_whatever_nodes_say_it_stays_within_bounds(
    reports: list[tuple[StepSums, StepSums]],
) -> None:
    live = LiveModel(PROFILE)
    for number, (prefill, decode) in enumerate(reports):
        live.report("odd/1", prefill, decode, float(number))
    for factor in live.factors(len(reports)).values():
        assert 1 / BOUND <= factor <= BOUND


def test_the_weighted_median() -> None:
    assert weighted_median([(1.0, 1.0), (2.0, 1.0), (9.0, 1.0)]) == 2.0
    assert weighted_median([(1.0, 1.0), (2.0, 1.0), (9.0, 5.0)]) == 9.0
