"""A tuner that was told wrong: what live steps mend, and what a probe cannot spoil."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.simulation.simulate import Simulated, simulate
from baton.simulation.tuned import Known
from tests.simulation.test_tuned import MODEL, OUTPUTS, PROMPTS, SETUP, SLO, TUNING, good, phases
from tuner.latency import LatencyModel
from tuner.online import Costs
from tuner.overheads import Overheads
from wire.types import Role

PHASE_S = 40
TRACE = phases(PROMPTS, OUTPUTS, phase_s=PHASE_S)
Formula = tuple[float, float, float]


def scaled(formula: Formula, index: int, factor: float) -> Formula:
    a, b, c = (factor * k if i == index else k for i, k in enumerate(formula))
    return a, b, c


def wrong(name: str, index: int, factor: float) -> LatencyModel:
    """One coefficient of the profile is not the nodes'."""
    if name == "prefill":
        return replace(MODEL, prefill=scaled(MODEL.prefill, index, factor))
    return replace(MODEL, decode=scaled(MODEL.decode, index, factor))


def told(believed: Costs, overheads: Overheads | None = None) -> Simulated:
    setup = SETUP if overheads is None else replace(SETUP, overheads=overheads)
    return simulate(replace(setup, tuning=replace(TUNING, believed=believed)), TRACE)


@pytest.fixture(scope="module")
def best() -> list[float]:
    """By phase, of somebody who knows what comes: no static split is better."""
    moves = ((0.0, Role.PREFILL, 1), (float(PHASE_S), Role.DECODE, 2))
    known = simulate(replace(SETUP, tuning=Known(moves)), TRACE)
    return [good(known, phase, PHASE_S) for phase in (0, 1)]


@pytest.mark.parametrize("factor", [2.5, 0.4])
@pytest.mark.parametrize("name", ["prefill", "decode"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_wrong_coefficient_is_mended_by_live_steps(
    best: list[float], name: str, index: int, factor: float
) -> None:
    run = told(Costs(wrong(name, index, factor)))
    for phase in (0, 1):
        assert good(run, phase, PHASE_S) >= 0.9 * best[phase]


@pytest.mark.parametrize("factor", [2.5, 0.4])
def test_a_profile_of_another_machine_is_mended(best: list[float], factor: float) -> None:
    a, b, c = (factor * k for k in MODEL.prefill)
    d, e, f = (factor * k for k in MODEL.decode)
    run = told(Costs(LatencyModel((a, b, c), (d, e, f), MODEL.transfer)))
    for phase in (0, 1):
        assert good(run, phase, PHASE_S) >= 0.9 * best[phase]


def test_a_probe_that_was_disturbed_stops_nobody(best: list[float]) -> None:
    """It says that a request takes longer than its limits before a step is made."""
    run = told(Costs(MODEL, front_s=10 * SLO.ttft_s, handoff_s=10.0))
    for phase in (0, 1):
        assert good(run, phase, PHASE_S) >= 0.9 * best[phase]
