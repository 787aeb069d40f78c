"""What else goes wrong: a poison request, two choices whose node dies, a client that leaves at the
moment of the commit, a router that stands still, a node that can open no connection any more.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process, wait_until
from tests.e2e.questions import (
    Question,
    answer_to,
    asking,
    assert_right,
    assert_whole,
    put,
    right_answer,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

QUESTION = Question(num_lines=5, max_tokens=60)
NEIGHBOUR = Question(num_lines=5, max_tokens=200, seed=2)
POISON = Question(num_lines=5, max_tokens=23)


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    fleet = make_shared_fleet()
    fleet.start_router("--node-timeout-s", "2")
    for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"):
        fleet.start_node(name[:-2], name, "--lease-ttl-s", "2")
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    for question in (QUESTION, NEIGHBOUR):
        right_answer(fleet, question)
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


def test_a_request_that_breaks_every_step_breaks_nothing_else(fleet: Fleet) -> None:
    """Ten of them, one after the other, beside a neighbour: five bad steps in a row end a node."""
    pids = {node.pid for node in fleet.nodes.values()}
    for node in fleet.role("decode"):
        node.order("poison", max_tokens=POISON.max_tokens)
    with asking(fleet, NEIGHBOUR) as neighbour:
        for _ in range(10):
            answer = answer_to(fleet, POISON)
            assert answer.error is not None
            assert answer.error["code"] == "internal"
        assert_right(fleet, NEIGHBOUR, neighbour.result(60))
    assert {node.pid for node in fleet.nodes.values() if node.wait(0) is None} == pids


async def choices(fleet: Fleet) -> list[str]:
    async with Client(fleet.url) as client:
        answer = await client.complete(
            model=fleet.model.name,
            prompt=QUESTION.prompt,
            max_tokens=60,
            temperature=1.0,
            seed=5,
            n=3,
            ignore_eos=True,
        )
    assert answer.status == 200, answer.error
    return [choice["text"] for choice in answer.chunks[0]["choices"]]


@pytest.mark.parametrize(("role", "point"), [("prefill", "before_commit"), ("decode", "token")])
def test_the_choices_of_a_request_outlive_a_node(fleet: Fleet, role: str, point: str) -> None:
    before = asyncio.run(choices(fleet))
    assert len(set(before)) == 3
    victim = fleet.role(role)[0]
    victim.order("strike", act="kill", point=point, nth=1 if role == "prefill" else 9)
    while victim.wait(0) is None:  # until one of them gets there
        assert asyncio.run(choices(fleet)) == before


@pytest.mark.parametrize("point", ["granted", "unit_landed", "before_verdict", "committed"])
def test_a_client_that_leaves_while_the_decode_node_is_at(fleet: Fleet, point: str) -> None:
    nodes = fleet.role("decode")
    for node in nodes:
        node.order("strike", act="stop", point=point)

    async def ask_and_leave() -> None:
        request = asyncio.ensure_future(put(fleet, QUESTION))
        while not any(node.stopped for node in nodes):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)

    asyncio.run(ask_and_leave())
    for node in nodes:
        if node.stopped:
            node.send(signal.SIGCONT)
    fleet.assert_balanced()
    for node in fleet.nodes.values():
        books = node.look()
        assert (books["attempts"], books["leases"]) == (0, [])


def test_a_router_that_stands_still_until_its_nodes_have_given_it_up(fleet: Fleet) -> None:
    router, decode = fleet.router, fleet.role("decode")
    assert router is not None
    with asking(fleet, NEIGHBOUR) as answer:
        wait_until(lambda: any(n.look()["attempts"] for n in decode), "a node generates")
        router.send(signal.SIGSTOP)
        time.sleep(7)  # a node's patience is 5 s
        router.send(signal.SIGCONT)
        assert_right(fleet, NEIGHBOUR, answer.result(60))


@contextmanager
def no_descriptors_left(node: Process) -> Iterator[None]:
    """It can open no file and no connection."""
    _, most = resource.prlimit(node.pid, resource.RLIMIT_NOFILE)
    in_use = 1 + max(int(name) for name in os.listdir(f"/proc/{node.pid}/fd"))
    resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (in_use, most))
    try:
        yield
    finally:
        if node.wait(0) is None:
            resource.prlimit(node.pid, resource.RLIMIT_NOFILE, (most, most))


def test_a_prefill_node_that_can_open_nothing(fleet: Fleet) -> None:
    """It cannot connect to a decode node that is new; others can, and it can again later."""
    for node in fleet.role("decode"):
        fleet.kill(node.name)
        fleet.start_node("decode", node.name, "--lease-ttl-s", "2").wait_ready()
    fleet.wait_for_nodes()
    poor = fleet.nodes["prefill-0"]
    with no_descriptors_left(poor):
        for _ in range(4):
            answer = answer_to(fleet, QUESTION)
            if answer.error is None:
                assert_right(fleet, QUESTION, answer)
    assert_whole(answer_to(fleet, QUESTION), QUESTION)
