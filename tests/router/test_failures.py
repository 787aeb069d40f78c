"""When a choice has failed often enough."""

from __future__ import annotations

import pytest

from router.failures import MAX_FAILURES, MAX_LOST_RESERVATIONS, Failures


def failed(cause: str, times: int) -> Failures:
    failures = Failures()
    for _ in range(times):
        failures.count(cause, None)
    return failures


@pytest.mark.parametrize(
    ("cause", "limit"),
    [("node_lost", 2), ("capacity", MAX_FAILURES), ("reserve_lost", MAX_LOST_RESERVATIONS)],
)
def test_each_cause_has_its_limit(cause: str, limit: int) -> None:
    assert not failed(cause, limit - 1).hopeless
    assert failed(cause, limit).hopeless


def test_lost_reservations_do_not_add_to_other_failures() -> None:
    failures = failed("reserve_lost", MAX_LOST_RESERVATIONS - 1)
    failures.count("node_lost", None)
    assert not failures.hopeless
