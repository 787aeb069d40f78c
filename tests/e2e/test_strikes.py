"""Nodes that die or stand still at one exact point of a handoff, and go on after the lease's life.

The process strikes itself (mischief.py), so "after the second chunk" is just that, however busy the
machine is. In every case the client gets the right text, and nothing is held afterwards.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process
from tests.e2e.questions import Question, asking, assert_right, right_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TTL_S = 1.0
QUESTION = Question()  # five chunks of 64 tokens, eighteen units, one of them partly filled
PREFILL_POINTS = [
    ("accepted", 1),
    ("chunk_sent", 1),
    ("chunk_sent", 3),
    ("before_commit", 1),
    ("commit_sent", 1),
    ("commit_answered", 1),
]
DECODE_POINTS = [
    ("granted", 1),
    ("unit_landed", 1),
    ("unit_landed", 11),
    ("before_verdict", 1),
    ("committed", 1),
    ("token", 7),
]


def started(fleet: Fleet, lease_ttl_s: float) -> Fleet:
    """Two nodes of each role, and the question's right answer."""
    fleet.start_router("--node-timeout-s", "2")
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        flags = ("--max-num-batched-tokens", "64", "--lease-ttl-s", str(lease_ttl_s))
        fleet.start_node(name[:-2], name, *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    right_answer(fleet, QUESTION)
    return fleet


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    return started(make_shared_fleet(), TTL_S)


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


def wait_struck(nodes: list[Process]) -> Process:
    """The one of them that has struck itself."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for node in nodes:
            if node.wait(0) is not None or node.stopped:
                return node
        time.sleep(0.01)
    raise AssertionError("nobody struck: the point was not reached")


def strike(fleet: Fleet, role: str, act: str, point: str, nth: int) -> None:
    for node in fleet.role(role):  # whichever of them gets the request's first attempt
        node.order("strike", act=act, point=point, nth=nth)
    with asking(fleet, QUESTION) as answer:
        victim = wait_struck(fleet.role(role))
        struck_at = time.monotonic()
        assert_right(fleet, QUESTION, answer.result(60))
    if act == "stop":
        time.sleep(max(0.0, struck_at + 1.5 * TTL_S - time.monotonic()))
        victim.send(signal.SIGCONT)


@pytest.mark.parametrize("act", ["kill", "stop"])
@pytest.mark.parametrize(("point", "nth"), PREFILL_POINTS)
def test_a_prefill_node(fleet: Fleet, act: str, point: str, nth: int) -> None:
    strike(fleet, "prefill", act, point, nth)


@pytest.mark.parametrize("act", ["kill", "stop"])
@pytest.mark.parametrize(("point", "nth"), DECODE_POINTS)
def test_a_decode_node(fleet: Fleet, act: str, point: str, nth: int) -> None:
    strike(fleet, "decode", act, point, nth)


@pytest.mark.parametrize(("point", "nth"), [("accepted", 1), ("chunk_sent", 3)])
def test_another_prefill_node_goes_on_under_the_same_reservation(
    make_fleet: MakeFleet, point: str, nth: int
) -> None:
    """A lease that outlives what a busy machine needs to notice a death: else it expires first."""
    fleet = started(make_fleet(), lease_ttl_s=30)
    before = {name: _rebound(fleet, name) for name in ("decode-0", "decode-1")}
    strike(fleet, "prefill", "kill", point, nth)
    assert sum(_rebound(fleet, name) - before[name] for name in before) == 1
    assert fleet.router is not None
    assert fleet.router.metrics()["baton_router_rebinds_total"] >= 1


def _rebound(fleet: Fleet, name: str) -> float:
    return fleet.nodes[name].metrics().get('baton_handoffs_total{outcome="rebound"}', 0.0)
