"""Two routers over one fleet: what one of them suffers or does is not the other one's trouble."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager

import pytest

from tests.e2e.client import Answer
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Count, Fleet, Orders, Process, wait_until
from tests.e2e.questions import Question, asking, assert_right, right_answer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

MINE = Question(num_lines=5, max_tokens=200)
THEIRS = Question(num_lines=5, max_tokens=600, seed=2)
ENDLESS = Question(num_lines=5, max_tokens=1500, seed=2)
LONG = Question(seed=3)  # five chunks of 64 tokens
SAMPLED = "baton_sampled_tokens_total"


def start(fleet: Fleet, orders: Orders = ()) -> Process:
    """A fleet whose nodes serve two routers; returns the one that the tests do harm to.

    Args:
        orders: for that router and the decode node.
    """
    victim = fleet.start_router(orders=orders)
    fleet.start_router()
    for role in ("prefill", "decode"):
        flags = ("--router", victim.fields["control"], "--max-num-batched-tokens", "64")
        ordered = orders if role == "decode" else ()
        fleet.start_node(role, f"{role}-0", *flags, "--lease-ttl-s", "2", orders=ordered)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    return victim


@contextmanager
def asking_three(
    fleet: Fleet, question: Question, router: Process
) -> Iterator[list[Future[Answer]]]:
    with ExitStack() as stack:
        yield [stack.enter_context(asking(fleet, question, router)) for _ in range(3)]


def num_generating(decode: Process) -> int:
    """Attempts that wait for no handoff."""
    books = decode.look()
    return books["attempts"] - len(books["leases"])


def test_a_router_dies_mid_stream(make_fleet: MakeFleet) -> None:
    """Both nodes drop what they do for it, at once, and nothing else."""
    fleet = make_fleet()
    victim = start(fleet)
    right_answer(fleet, MINE)
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]
    sampled = Count(decode, SAMPLED)
    with asking(fleet, MINE) as mine, asking_three(fleet, ENDLESS, victim) as theirs:
        wait_until(lambda: num_generating(decode) == 4, "all streams are under way")
        prefill.order("strike", act="stop", point="chunk_sent", nth=3)
        with asking(fleet, LONG, victim) as long:
            wait_until(lambda: prefill.stopped, "a prompt is under way, too")
            victim.send(signal.SIGKILL)
            victim.wait(10)
            prefill.send(signal.SIGCONT)
            for answer in (*theirs, long):
                assert answer.exception(60) is not None
        wait_until(lambda: prefill.look()["attempts"] == 0, "the prefill node has dropped it")
        wait_until(lambda: decode.look()["attempts"] <= 1, "the decode node has dropped them")
        assert sampled.since() < 2 * ENDLESS.max_tokens, "it went on for nobody"
        assert_right(fleet, MINE, mine.result(60))
    fleet.assert_balanced()
    for node in fleet.nodes.values():
        assert node.look()["leases"] == []


def test_a_router_that_reads_nothing(make_fleet: MakeFleet) -> None:
    """Its requests end where its outbox is full: no token is dropped from one that goes on."""
    fleet = make_fleet()
    victim = start(fleet, orders=[("narrow_links", {"num_messages": 8, "num_bytes": 1 << 13})])
    for question in (MINE, THEIRS):
        right_answer(fleet, question)
    decode = fleet.nodes["decode-0"]
    sampled = Count(decode, SAMPLED)
    with asking(fleet, MINE) as mine, asking_three(fleet, THEIRS, victim) as theirs:
        wait_until(lambda: num_generating(decode) == 4, "all streams are under way")
        victim.send(signal.SIGSTOP)
        try:
            wait_until(lambda: "does not read" in decode.log.read_text(), "its outbox is full")
            wait_until(lambda: decode.look()["attempts"] <= 1, "its requests are dropped")
            assert sampled.since() < 2 * THEIRS.max_tokens, "it went on for nobody"
            assert_right(fleet, MINE, mine.result(60))
            fleet.assert_balanced()
        finally:
            victim.send(signal.SIGCONT)
        for answer in theirs:
            assert_right(fleet, THEIRS, answer.result(100))
    fleet.assert_balanced()
