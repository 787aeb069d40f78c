"""The only prefill node is replaced by a process of the same name while it computes a prompt.

Where its death is noticed the decode node goes on alone; where it stands still, with the new life:
nothing that the old one sent, or sends later, may count.
"""

from __future__ import annotations

import signal

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process, wait_until
from tests.e2e.questions import Question, answer_to, asking, assert_right, right_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

QUESTION = Question()  # five chunks of 64 tokens, eighteen units
POINTS = [("accepted", 1), ("chunk_sent", 3), ("commit_sent", 1)]


def started(fleet: Fleet, node_timeout_s: float) -> Process:
    """One node of each role, leases that outlive the test; returns the prefill node."""
    fleet.start_router("--node-timeout-s", str(node_timeout_s))
    for role in ("prefill", "decode"):
        flags = ("--max-num-batched-tokens", "64", "--lease-ttl-s", "60")
        fleet.start_node(role, f"{role}-0", *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    right_answer(fleet, QUESTION)
    return fleet.nodes["prefill-0"]


@pytest.mark.parametrize(("point", "nth"), POINTS)
def test_it_dies_and_comes_back(make_fleet: MakeFleet, point: str, nth: int) -> None:
    fleet = make_fleet()
    victim = started(fleet, node_timeout_s=2)
    victim.order("strike", act="kill", point=point, nth=nth)
    with asking(fleet, QUESTION) as answer:
        wait_until(lambda: victim.wait(0) is not None, "it dies")
        fleet.restart_node("prefill-0").wait_ready()
        assert_right(fleet, QUESTION, answer.result(60))
    fleet.assert_balanced()


@pytest.mark.parametrize(("point", "nth"), POINTS[:2])  # then all is sent: nobody needs it
def test_it_is_replaced_while_it_stands_still(make_fleet: MakeFleet, point: str, nth: int) -> None:
    """The successor goes on under the same reservation; then the old life wakes up and talks."""
    fleet = make_fleet()
    victim = started(fleet, node_timeout_s=60)
    victim.order("strike", act="stop", point=point, nth=nth)
    with asking(fleet, QUESTION) as answer:
        wait_until(lambda: victim.stopped, "it stands still")
        fleet.restart_node("prefill-0").wait_ready()
        assert_right(fleet, QUESTION, answer.result(60))
    assert fleet.router is not None
    assert fleet.router.metrics()["baton_router_rebinds_total"] == 1
    victim.send(signal.SIGCONT)
    assert victim.wait(30) not in (None, 0), "there is another one of its name"
    assert_right(fleet, QUESTION, answer_to(fleet, QUESTION))
    fleet.assert_balanced()
