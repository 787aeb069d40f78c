"""Both nodes of a handoff stand still at once, and go on when everything is long over."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Count, Fleet, Process, wait_until
from tests.e2e.questions import Question, asking, assert_right, right_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TTL_S = 1.0
QUESTION = Question()  # five chunks of 64 tokens
POINTS = [("prefill", "chunk_sent", 2), ("decode", "before_verdict", 1), ("decode", "token", 7)]


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    fleet = make_shared_fleet()
    fleet.start_router("--node-timeout-s", "4")
    for role in ("prefill", "decode"):
        flags = ("--max-num-batched-tokens", "64", "--lease-ttl-s", str(TTL_S))
        fleet.start_node(role, f"{role}-0", *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    right_answer(fleet, QUESTION)
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


def stop_both(fleet: Fleet, role: str, point: str, nth: int) -> None:
    """One stops itself at the point; the other one is stopped wherever it is by then."""
    other = "prefill" if role == "decode" else "decode"
    wait_until(lambda: node_of(fleet, role).stopped, "the point was reached")
    node_of(fleet, other).send(signal.SIGSTOP)


def node_of(fleet: Fleet, role: str) -> Process:
    return fleet.nodes[f"{role}-0"]


@pytest.mark.parametrize("first", ["prefill", "decode"])
@pytest.mark.parametrize(("role", "point", "nth"), POINTS)
def test_for_longer_than_a_lease(fleet: Fleet, role: str, point: str, nth: int, first: str) -> None:
    """Whoever goes on first finds the other one silent still, and acts upon what it believes."""
    second = "prefill" if first == "decode" else "decode"
    node_of(fleet, role).order("strike", act="stop", point=point, nth=nth)
    with asking(fleet, QUESTION) as answer:
        stop_both(fleet, role, point, nth)
        time.sleep(1.5 * TTL_S)
        node_of(fleet, first).send(signal.SIGCONT)
        time.sleep(0.3 * TTL_S)
        node_of(fleet, second).send(signal.SIGCONT)
        assert_right(fleet, QUESTION, answer.result(60))


@pytest.mark.parametrize(("role", "point", "nth"), POINTS)
def test_until_the_router_has_given_both_up(fleet: Fleet, role: str, point: str, nth: int) -> None:
    """Then there is no fleet at all; the request waits for one and goes on where it was."""
    assert fleet.router is not None
    lost = Count(fleet.router, 'baton_router_attempts_ended_total{cause="node_lost"}')
    node_of(fleet, role).order("strike", act="stop", point=point, nth=nth)
    with asking(fleet, QUESTION) as answer:
        stop_both(fleet, role, point, nth)
        wait_until(lambda: fleet.num_serving == 0, "both are given up")
        for node in fleet.nodes.values():
            node.send(signal.SIGCONT)
        assert_right(fleet, QUESTION, answer.result(60))
    assert lost.since() == 1, "two deaths would have ended the request"
