"""Every state that the scenarios can reach keeps every invariant; see tests/proof/explore.py."""

from __future__ import annotations

import pytest

from tests.proof.explore import Explorer
from tests.proof.world import SCENARIOS, Scenario

EVERY_END = {"COMMITTED", "REJECTED", "EXPIRED", "REVOKED", "RELEASED", "QUARANTINED"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_reachable_state_breaks_an_invariant(scenario: Scenario) -> None:
    report = Explorer(scenario).run()
    print(report)
    assert report.complete
    assert report.outcomes["COMMITTED"], "the model never gets to the point"
    rebinds = any(attempt.rebinds for attempt in scenario.attempts)
    assert bool(report.outcomes["REBOUND"]) == rebinds


def test_every_way_to_end_is_among_what_is_explored() -> None:
    seen = {"QUARANTINED"}
    for scenario in SCENARIOS[:3]:
        outcomes = Explorer(scenario).run(max_states=3000).outcomes
        seen |= {name for name, times in outcomes.items() if times}
    assert seen == EVERY_END


def test_a_bound_is_kept_and_said() -> None:
    report = Explorer(SCENARIOS[0]).run(max_depth=4)
    assert (report.depth, report.complete) == (4, False)
    assert Explorer(SCENARIOS[0]).run(max_states=100).num_states >= 100


def test_two_runs_visit_the_same() -> None:
    first, second = (Explorer(SCENARIOS[1]).run(max_depth=8) for _ in range(2))
    assert (first.num_states, first.num_transitions) == (second.num_states, second.num_transitions)
