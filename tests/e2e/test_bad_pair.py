"""Two nodes that are well and hand over badly to each other: avoided while there is another way."""

from __future__ import annotations

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, handoffs, wait_until
from tests.e2e.questions import Question, answer_to, assert_right, right_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

QUESTION = Question(num_lines=3, max_tokens=4)
NUM_REQUESTS = 10
ALWAYS = 1 << 30


def start(fleet: Fleet) -> Fleet:
    """Without a fault every request takes the first of the two decode nodes."""
    fleet.start_router()
    for name in ("prefill-0", "decode-0", "decode-1"):
        fleet.start_node(name[:-2], name)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    right_answer(fleet, QUESTION)
    return fleet


def test_it_is_avoided_and_tried_again_later(make_fleet: MakeFleet) -> None:
    """After three failures in a row one request per pause finds out, and takes the other way."""
    fleet = start(make_fleet())
    router, bad, good = fleet.router, fleet.nodes["decode-0"], fleet.nodes["decode-1"]
    assert router is not None
    rejected, committed = handoffs(bad, "digest"), handoffs(good, "committed")
    bad.order("flip_bit", token=0, byte=0, bit=6, times=ALWAYS)
    for _ in range(NUM_REQUESTS):
        assert_right(fleet, QUESTION, answer_to(fleet, QUESTION))
    num_openings = router.log.read_text().count("handoffs from")
    assert num_openings >= 1
    assert rejected.since() == 2 + num_openings < NUM_REQUESTS
    assert committed.since() == NUM_REQUESTS
    assert router.metrics()["baton_router_open_pairs"] == 1

    bad.behave()
    tried = handoffs(bad, "committed")

    def tried_again() -> bool:
        assert_right(fleet, QUESTION, answer_to(fleet, QUESTION))
        return tried.since() > 0

    wait_until(tried_again, "the pause is over, and a request was the trial")
    assert router.metrics()["baton_router_open_pairs"] == 0
    fleet.assert_balanced()
