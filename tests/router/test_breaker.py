"""The circuit breaker of pairs: when it opens, who is tried, what forgives; that it is bounded."""

from __future__ import annotations

import random

import pytest

from router import breaker as module
from router.breaker import OF_TRANSFERS, Breaker, BreakerLimits, BreakerState, Pair
from telemetry.causes import CAUSES
from wire.types import NodeId

A, B, C = (NodeId(name, 1) for name in "abc")
AB, AC = Pair(A, B), Pair(A, C)
LIMITS = BreakerLimits(failures=3, within_s=60.0, pause_s=5.0, max_pause_s=20.0)


def opened() -> Breaker:
    """AB has just opened, at 2."""
    breaker = Breaker(LIMITS)
    assert [breaker.failed(AB, now) for now in (0, 1, 2)] == [False, False, True]
    return breaker


def test_failures_in_a_row_open_one_pair() -> None:
    breaker = opened()
    assert (breaker.state(AB), breaker.num_open) == (BreakerState.OPEN, 1)
    assert not breaker.allows(AB, 6.9)
    assert breaker.allows(AC, 2)
    assert breaker.allows(AB, 7)


def test_failures_far_apart_do_not() -> None:
    breaker = Breaker(LIMITS)
    assert not any(breaker.failed(AB, now) for now in (0, 31, 62, 93))
    assert breaker.failed(AB, 94)


def test_a_commit_between_them_forgives() -> None:
    breaker = Breaker(LIMITS)
    for now in range(9):
        breaker.failed(AB, now)
        if now % 2:
            assert not breaker.committed(AB), "it was never open"
    assert breaker.num_open == 0


def test_there_is_one_trial_at_a_time() -> None:
    breaker = opened()
    breaker.began(AB, 7)
    assert breaker.state(AB) is BreakerState.HALF_OPEN
    assert not breaker.allows(AB, 7)
    assert not breaker.allows(AB, 11.9)
    assert breaker.allows(AB, 12), "nothing was heard of the first"


def test_a_commit_closes_it() -> None:
    breaker = opened()
    breaker.began(AB, 7)
    assert breaker.committed(AB)
    assert (breaker.state(AB), len(breaker)) == (BreakerState.CLOSED, 0)
    assert not breaker.failed(AB, 8), "all is forgiven"


def test_a_trial_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now = opened(), 2.0
    for pause_s in (5, 10, 20, 20):
        assert not breaker.allows(AB, now + pause_s - 0.1)
        now += pause_s
        assert breaker.allows(AB, now)
        breaker.began(AB, now)
        assert breaker.failed(AB, now)


def test_what_began_before_the_pause_prolongs_nothing() -> None:
    breaker = opened()
    breaker.began(AB, 3)  # there was no other pair
    assert breaker.state(AB) is BreakerState.OPEN
    assert not breaker.failed(AB, 4)
    assert breaker.allows(AB, 7)


def test_the_next_life_of_a_node_begins_anew() -> None:
    for node in AB:
        breaker = opened()
        breaker.failed(AC, 0)
        breaker.forget(node)
        assert breaker.state(AB) is BreakerState.CLOSED
        assert len(breaker) == (node == B)


def test_the_number_of_pairs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_PAIRS", 10)
    breaker = opened()
    for life in range(100):
        breaker.failed(Pair(A, NodeId("d", life)), 3)
    assert len(breaker) == 10
    assert breaker.num_open == 0, "the oldest made room"


def test_causes_are_those_that_nodes_tell() -> None:
    assert CAUSES.keys() > OF_TRANSFERS
    assert not OF_TRANSFERS & {"capacity", "revoked", "drained", "draining", "gone", "node_lost"}


@pytest.mark.parametrize("seed", range(20))
def test_walks_try_an_open_pair_once_per_pause_and_always_close(seed: int) -> None:
    dice, breaker, now = random.Random(seed), Breaker(LIMITS), 0.0
    last_try = -1e9
    for _ in range(2000):
        now += dice.uniform(0, 2)
        if breaker.allows(AB, now):
            if breaker.state(AB) is not BreakerState.CLOSED:
                assert now - last_try >= LIMITS.pause_s
                last_try = now
            breaker.began(AB, now)
            assert breaker.state(AB) is not BreakerState.OPEN
        if dice.random() < 0.6:
            was = breaker.state(AB)
            if breaker.failed(AB, now):
                assert was is not BreakerState.OPEN
                assert not breaker.allows(AB, now)
        elif dice.random() < 0.3:
            was_open = breaker.num_open == 1
            assert breaker.committed(AB) == was_open
            assert breaker.state(AB) is BreakerState.CLOSED
        assert len(breaker) <= 1
    assert breaker.allows(AB, now + LIMITS.max_pause_s)
