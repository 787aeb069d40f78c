"""The model that follows live steps: it finds the machine's pace, and nothing drives it away."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.latency import LatencyModel, Vector, predict
from tuner.live import BOUND, MAX_NODES, MEMORY_S, LiveModel, nearest
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
    work = (10.0, 2000.0, 150.0)  # as the steps of a second
    for formula, profiled, pace in (
        (found.prefill, PROFILE.prefill, 1.5),
        (found.decode, PROFILE.decode, 0.8),
    ):
        assert predict(formula, work) == pytest.approx(pace * predict(profiled, work), rel=0.01)
    assert found.transfer == PROFILE.transfer
    paces = machine.live.factors(machine.now)
    assert paces == pytest.approx({"prefill": 1.5, "decode": 0.8}, rel=0.01)


def decode_samples(wrong: int, factor: float, batches: range) -> tuple[Vector, Vector]:
    """Steps of a machine whose profile says `factor` times what a coefficient is."""
    rows, weights = [], []
    for batch in batches:
        truth = [k * x for k, x in zip(PROFILE.decode, (1.0, 500.0 * batch, batch), strict=True)]
        said = [part * (factor if i == wrong else 1.0) for i, part in enumerate(truth)]
        rows.append([part / sum(truth) for part in said])
        weights.append(20 * sum(said))
    return np.array(rows), np.array(weights)


@pytest.mark.parametrize("factor", [2.5, 0.4])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_a_coefficient_that_is_wrong_is_found(wrong: int, factor: float) -> None:
    """Whatever part the other ones have in it: together they say what is true."""
    shares, weights = decode_samples(wrong, factor, range(1, 60))
    assert shares @ nearest(shares, weights) == pytest.approx(np.ones(len(shares)), rel=0.1)


def test_what_the_load_does_not_tell_stays_as_profiled() -> None:
    """Of a request or two the constant is nearly all; the rest of the formula is still right."""
    factors = nearest(*decode_samples(0, 2.5, range(1, 3)))
    assert factors[0] == pytest.approx(0.4, rel=0.1)
    assert factors[1:] == pytest.approx([1.0, 1.0], rel=0.1)


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
        assert machine.live.factors(machine.now)["decode"] == pytest.approx(pace, rel=0.05)
    machine.now += 2 * MEMORY_S
    assert machine.live.model(machine.now) == PROFILE


def test_outliers_move_nothing() -> None:
    """A third of the seconds are of a machine that swaps."""
    machine = Machine(LiveModel(PROFILE))
    for second in range(60):
        machine.second(*((1.2, 1.2) if second % 3 else (50.0, 50.0)))
    assert machine.live.factors(machine.now)["prefill"] == pytest.approx(1.2, rel=0.05)


@pytest.mark.parametrize(("pace", "found"), [(100.0, BOUND), (0.1, 1 / BOUND)])
def test_it_does_not_run_away(pace: float, found: float) -> None:
    machine = Machine(LiveModel(PROFILE))
    for _ in range(100):
        machine.second(pace, 1.0)
    assert machine.live.factors(machine.now) == pytest.approx(
        {"prefill": found, "decode": 1.0}, rel=0.01
    )


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
    assert machine.live.factors(machine.now)["prefill"] == pytest.approx(1.3, rel=0.02)


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
        assert 0.999 / BOUND <= factor <= 1.001 * BOUND
    model = live.model(len(reports))
    for found, profiled in ((model.prefill, PROFILE.prefill), (model.decode, PROFILE.decode)):
        for value, said in zip(found, profiled, strict=True):
            assert 0.999 * said / BOUND <= value <= 1.001 * said * BOUND
