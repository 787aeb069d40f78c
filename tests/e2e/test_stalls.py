"""Nodes that stand still (SIGSTOP) and go on later (SIGCONT), under load on a real fleet.

A node that went on after it was given up still believes in its requests: what it sends then must
reach nobody, and it must become a node like any other.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MODEL = DEFAULT_MODEL.name
TTL_S = 2.0
MOVED = "baton_router_attempts_ended_total"
CHUNKS = "baton_unfinished_chunks_total"
NODE_FLAGS = ("--max-num-batched-tokens", "64", "--lease-ttl-s", str(TTL_S))
NUM_REQUESTS = 6  # of which a node takes half, and can take all


@dataclass(frozen=True)
class Size:
    """Of the requests of a test. A line of the prompt is about 14 tokens."""

    num_lines: int
    max_tokens: int


LONG_PROMPTS = Size(num_lines=86, max_tokens=20)
LONG_OUTPUTS = Size(num_lines=12, max_tokens=150)


def start(
    fleet: Fleet, prefill: int, decode: int, node_timeout_s: float = 1.5, transport: str = "auto"
) -> Fleet:
    """A fleet with small chunks and short leases."""
    fleet.start_router("--node-timeout-s", str(node_timeout_s))
    for role, count in (("prefill", prefill), ("decode", decode)):
        for index in range(count):
            fleet.start_node(role, f"{role}-{index}", *NODE_FLAGS, "--transport", transport)
    for node in fleet.nodes.values():
        node.wait_ready()
    wait_for_nodes(fleet, "prefill", prefill)
    wait_for_nodes(fleet, "decode", decode)
    fleet.wait_serving()
    return fleet


async def ask(client: Client, index: int, salt: str, size: Size) -> Answer:
    """One sampled stream. The salt decides what is found in caches, not the text."""
    lines = (f"def function_{index}_{n}(self):\n    return {n}\n" for n in range(size.num_lines))
    return await client.stream(
        model=MODEL,
        prompt="".join(lines),
        max_tokens=size.max_tokens,
        temperature=0.8,
        seed=index,
        cache_salt=salt,
        ignore_eos=True,
    )


def ask_many(
    fleet: Fleet,
    salt: str,
    size: Size,
    disturb: Callable[[], Awaitable[None]] | None = None,
) -> list[str]:
    """The texts of some requests at once, every one of them whole."""

    async def run() -> list[Answer]:
        async with Client(fleet.url) as client:
            streams = [
                asyncio.ensure_future(ask(client, i, salt, size)) for i in range(NUM_REQUESTS)
            ]
            if disturb is not None:
                await disturb()
            return await asyncio.gather(*streams)

    answers = asyncio.run(run())
    for answer in answers:
        assert answer.status == 200, answer.error
        assert answer.error is None
        assert answer.done
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == size.max_tokens
    return [answer.text for answer in answers]


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.005)


class Watch:
    """Waits until a node has counted so much more of `metric` than when the watch was made."""

    def __init__(self, node: Process, metric: str, amount: float) -> None:
        self._node, self._metric = node, metric
        self._goal = node.metrics()[metric] + amount

    async def over(self) -> None:
        what = f"{self._metric} of {self._node.name} is {self._goal}"
        await asyncio.to_thread(wait_until, self._is_over, what)

    def _is_over(self) -> bool:
        return self._node.metrics()[self._metric] >= self._goal


@contextmanager
def continued(node: Process) -> Iterator[None]:
    """However the block ends, the node runs again: a stopped one cannot even be terminated."""
    try:
        yield
    finally:
        node.send(signal.SIGCONT)


def num_moved(fleet: Fleet) -> float:
    """Attempts that ended before their request did."""
    assert fleet.router is not None
    counters = fleet.router.metrics().items()
    return sum(value for name, value in counters if name.startswith(MOVED))


def num_taken(node: Process) -> tuple[float, float]:
    """Bytes that were placed in blocks, and commits that were accepted."""
    metrics = node.metrics()
    committed = metrics['baton_handoffs_total{outcome="committed"}']
    return metrics["baton_transfer_bytes_received_total"], committed


def num_sampled(node: Process) -> float:
    return node.metrics()["baton_sampled_tokens_total"]


def wait_for_nodes(fleet: Fleet, role: str, count: int) -> None:
    """Return when the router has so many serving nodes of the role."""
    router, name = fleet.router, f'baton_router_nodes{{role="{role}",state="serving"}}'
    assert router is not None
    wait_until(lambda: router.metrics()[name] == count, f"{count} {role} nodes serve")


def assert_used(fleet: Fleet, node: Process, size: Size, expected: list[str]) -> None:
    """The node gets work like any other, and the texts are right."""
    before = num_sampled(node)
    assert ask_many(fleet, "afterwards", size) == expected
    assert num_sampled(node) > before


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_prefill_node_that_was_given_up_changes_nothing_when_it_goes_on(
    make_fleet: MakeFleet, transport: str
) -> None:
    fleet = start(make_fleet(), prefill=2, decode=1, transport=transport)
    undisturbed = ask_many(fleet, "undisturbed", LONG_PROMPTS)
    stopped, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]
    watch = Watch(stopped, CHUNKS, 8)

    async def stop() -> None:
        await watch.over()
        stopped.send(signal.SIGSTOP)

    with continued(stopped):
        assert ask_many(fleet, "disturbed", LONG_PROMPTS, stop) == undisturbed
        assert num_moved(fleet) > 0, "the node stopped too late to disturb anybody"
        wait_for_nodes(fleet, "prefill", 1)
        time.sleep(TTL_S)
        taken = num_taken(decode)
    wait_for_nodes(fleet, "prefill", 2)
    fleet.assert_balanced()
    assert num_taken(decode) == taken, "something late was taken"
    assert_used(fleet, stopped, LONG_PROMPTS, undisturbed)
    fleet.assert_balanced()


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_leases_end_while_the_only_prefill_node_stands_still(
    make_fleet: MakeFleet, transport: str
) -> None:
    """It is not given up: when it goes on, attempts that ended meet their successors."""
    fleet = start(make_fleet(), prefill=1, decode=1, node_timeout_s=60, transport=transport)
    undisturbed = ask_many(fleet, "undisturbed", LONG_PROMPTS)
    node = fleet.nodes["prefill-0"]
    watch = Watch(node, CHUNKS, 8)

    async def pause() -> None:
        await watch.over()
        node.send(signal.SIGSTOP)
        await asyncio.to_thread(wait_until, lambda: num_moved(fleet) > 0, "a lease has ended")
        node.send(signal.SIGCONT)

    with continued(node):
        assert ask_many(fleet, "disturbed", LONG_PROMPTS, pause) == undisturbed
    fleet.assert_balanced()
    assert_used(fleet, node, LONG_PROMPTS, undisturbed)
    fleet.assert_balanced()


def test_a_decode_node_that_was_given_up_changes_nothing_when_it_goes_on(
    make_fleet: MakeFleet,
) -> None:
    fleet = start(make_fleet(), prefill=1, decode=2)
    undisturbed = ask_many(fleet, "undisturbed", LONG_OUTPUTS)
    stopped = fleet.nodes["decode-0"]
    watch = Watch(stopped, "baton_sampled_tokens_total", 40)

    async def stop() -> None:
        await watch.over()
        stopped.send(signal.SIGSTOP)

    with continued(stopped):
        assert ask_many(fleet, "disturbed", LONG_OUTPUTS, stop) == undisturbed
        assert num_moved(fleet) > 0, "the node stopped too late to disturb anybody"
        wait_for_nodes(fleet, "decode", 1)
        time.sleep(TTL_S)
    wait_for_nodes(fleet, "decode", 2)
    fleet.assert_balanced()
    assert_used(fleet, stopped, LONG_OUTPUTS, undisturbed)
    fleet.assert_balanced()


def test_streams_go_on_after_a_short_stop_of_the_only_decode_node(make_fleet: MakeFleet) -> None:
    fleet = start(make_fleet(), prefill=1, decode=1, node_timeout_s=60)
    undisturbed = ask_many(fleet, "undisturbed", LONG_OUTPUTS)
    node = fleet.nodes["decode-0"]
    watch = Watch(node, 'baton_handoffs_total{outcome="committed"}', NUM_REQUESTS)

    async def pause() -> None:
        await watch.over()
        node.send(signal.SIGSTOP)
        await asyncio.sleep(1)
        node.send(signal.SIGCONT)

    with continued(node):
        assert ask_many(fleet, "disturbed", LONG_OUTPUTS, pause) == undisturbed
    assert num_moved(fleet) == 0
    fleet.assert_balanced()


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_the_only_decode_node_stands_still_while_it_receives(
    make_fleet: MakeFleet, transport: str
) -> None:
    """For longer than a lease: then it finds everything at once, too late by its own clock."""
    fleet = start(make_fleet(), prefill=1, decode=1, node_timeout_s=60, transport=transport)
    undisturbed = ask_many(fleet, "undisturbed", LONG_PROMPTS)
    node = fleet.nodes["decode-0"]
    watch = Watch(node, "baton_transfer_bytes_received_total", 1 << 20)

    async def pause() -> None:
        await watch.over()
        node.send(signal.SIGSTOP)
        await asyncio.sleep(1.5 * TTL_S)
        node.send(signal.SIGCONT)

    with continued(node):
        assert ask_many(fleet, "disturbed", LONG_PROMPTS, pause) == undisturbed
    assert num_moved(fleet) > 0, "the node stopped too late to disturb anybody"
    fleet.assert_balanced()
    assert_used(fleet, node, LONG_PROMPTS, undisturbed)
    fleet.assert_balanced()
