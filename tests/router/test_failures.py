"""When a choice has failed often enough."""

from __future__ import annotations

import pytest

from router.breaker import Pair
from router.failures import MAX_DRAINED, MAX_FAILURES, MAX_LOST_RESERVATIONS, MAX_REVOKED, Failures
from tests.router.scripted_nodes import D1, P1
from wire.types import NodeId


def failed(cause: str, times: int) -> Failures:
    failures = Failures()
    for _ in range(times):
        failures.count(cause, None)
    return failures


@pytest.mark.parametrize(
    ("cause", "limit"),
    [
        ("node_lost", 2),
        ("capacity", MAX_FAILURES),
        ("reserve_lost", MAX_LOST_RESERVATIONS),
        ("drained", MAX_DRAINED),
        ("revoked", MAX_REVOKED),
    ],
)
def test_each_cause_has_its_limit(cause: str, limit: int) -> None:
    assert not failed(cause, limit - 1).hopeless
    assert failed(cause, limit).hopeless


@pytest.mark.parametrize(
    ("cause", "limit"),
    [
        ("reserve_lost", MAX_LOST_RESERVATIONS),
        ("drained", MAX_DRAINED),
        ("revoked", MAX_REVOKED),
    ],
)
def test_what_the_fleet_does_adds_nothing_to_other_failures(cause: str, limit: int) -> None:
    """A stream that outlives many changes of role still has its own failures before it."""
    failures = failed(cause, limit - 1)
    failures.count("node_lost", None)
    assert not failures.hopeless


@pytest.mark.parametrize(("cause", "avoided"), [("expired", {P1}), ("digest", set())])
def test_an_expired_lease_speaks_against_its_sender(cause: str, avoided: set[NodeId]) -> None:
    """A whole TTL without a word: there is no telling which way would reach it."""
    failures = Failures()
    failures.count(cause, Pair(P1, D1))
    assert (failures.avoid, failures.pairs) == (avoided, {Pair(P1, D1)})
