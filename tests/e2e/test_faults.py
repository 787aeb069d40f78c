"""Processes that die, stop, come back or misbehave, under real load on a real fleet."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

MODEL = DEFAULT_MODEL.name
MOVED = "baton_router_attempts_ended_total"


async def ask(client: Client, index: int, max_tokens: int = 80) -> Answer:
    """One sampled stream; equal arguments give equal text."""
    return await client.stream(
        model=MODEL,
        prompt=f"def function_{index}(self, value):\n    " * (1 + 10 * (index % 5)),
        max_tokens=max_tokens,
        temperature=0.8,
        seed=index,
        ignore_eos=True,
    )


async def ask_many(
    fleet: Fleet,
    count: int,
    disturb: Callable[[], Awaitable[None]] | None = None,
    max_tokens: int = 80,
) -> list[Answer]:
    async with Client(fleet.url) as client:
        streams = [asyncio.ensure_future(ask(client, i, max_tokens)) for i in range(count)]
        if disturb is not None:
            await disturb()
        return await asyncio.gather(*streams)


def assert_whole(answers: list[Answer], max_tokens: int = 80) -> None:
    for answer in answers:
        assert answer.status == 200
        assert answer.error is None
        assert answer.done
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == max_tokens


async def until_busy(fleet: Fleet, name: str, num_tokens: float = 20) -> None:
    """Return when the node has sampled so many tokens."""
    node = fleet.nodes[name]
    while True:
        metrics = await asyncio.to_thread(node.metrics)
        if metrics["baton_sampled_tokens_total"] >= num_tokens:
            return


def num_moved(fleet: Fleet) -> float:
    """Attempts that ended before their request did."""
    assert fleet.router is not None
    counters = fleet.router.metrics().items()
    return sum(value for name, value in counters if name.startswith(MOVED))


def test_streams_go_on_with_the_same_text_when_a_decode_node_is_killed(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet().start(prefill=1, decode=2)
    undisturbed = asyncio.run(ask_many(fleet, 8))
    assert_whole(undisturbed)

    before = fleet.nodes["decode-0"].metrics()["baton_sampled_tokens_total"]

    async def kill() -> None:
        await until_busy(fleet, "decode-0", before + 40)
        fleet.kill("decode-0")

    disturbed = asyncio.run(ask_many(fleet, 8, kill))
    assert_whole(disturbed)
    assert num_moved(fleet) > 0, "the node died too late to disturb anybody"
    assert [a.text for a in disturbed] == [a.text for a in undisturbed]
    fleet.assert_balanced()


def test_requests_move_when_a_prefill_node_is_killed(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(prefill=2, decode=1)

    async def kill() -> None:
        await until_busy(fleet, "prefill-0", 3)
        fleet.kill("prefill-0")

    assert_whole(asyncio.run(ask_many(fleet, 30, kill, max_tokens=10)), max_tokens=10)
    assert num_moved(fleet) > 0, "the node died too late to disturb anybody"
    fleet.assert_balanced()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_restarted_node_is_used_again(make_fleet: MakeFleet, role: str) -> None:
    fleet = make_fleet().start()
    assert_whole(asyncio.run(ask_many(fleet, 2)))
    fleet.kill(f"{role}-0")
    fleet.wait_for_nodes()
    if role == "prefill":  # the decode node serves alone meanwhile
        assert_whole(asyncio.run(ask_many(fleet, 2)))
    fleet.start_node(role, f"{role}-0").wait_ready()
    fleet.wait_serving()
    assert_whole(asyncio.run(ask_many(fleet, 2)))
    fleet.assert_balanced()


def test_the_only_decode_node_dies_mid_stream(make_fleet: MakeFleet) -> None:
    """Nobody can go on: an error event, no hang, and the prefill node gives everything back."""
    fleet = make_fleet()
    fleet.start_router("--queue-timeout-s", "2")
    for role in ("prefill", "decode"):
        fleet.start_node(role, f"{role}-0")
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()

    async def kill() -> None:
        await until_busy(fleet, "decode-0")
        fleet.kill("decode-0")

    for answer in asyncio.run(ask_many(fleet, 3, kill, max_tokens=1000)):
        assert answer.error is not None
        assert answer.status == 503 or answer.done
    fleet.assert_balanced()


def test_a_client_that_hangs_up_frees_both_nodes(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start()

    async def hang_up() -> None:
        async with Client(fleet.url) as client:
            await asyncio.gather(
                *(
                    client.stream(
                        stop_after=2,
                        model=MODEL,
                        prompt=f"# file {i}\n",
                        max_tokens=1500,
                        ignore_eos=True,
                    )
                    for i in range(6)
                )
            )

    asyncio.run(hang_up())
    fleet.assert_balanced(timeout_s=3)
    metrics = fleet.nodes["decode-0"].metrics()
    assert metrics["baton_sampled_tokens_total"] < 6 * 1500, "it went on for nobody"


def test_sigterm_drains_a_node(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(prefill=1, decode=2)
    leaving = fleet.nodes["decode-0"]

    async def terminate() -> None:
        await asyncio.sleep(0.3)
        leaving.send(signal.SIGTERM)

    assert_whole(asyncio.run(ask_many(fleet, 6, terminate)))
    assert leaving.wait(20) == 0, leaving.log.read_text()
    del fleet.nodes["decode-0"]
    assert_whole(asyncio.run(ask_many(fleet, 3)))
    fleet.assert_balanced()


def test_nodes_outlive_their_router(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start()
    assert fleet.router is not None
    port = fleet.router.fields["control"].rpartition(":")[2]

    async def kill() -> None:
        await until_busy(fleet, "decode-0")
        assert fleet.router is not None
        fleet.router.send(signal.SIGKILL)
        fleet.router.wait(10)

    with pytest.raises(Exception, match=r"(?i)disconnect|payload|reset|connect"):
        asyncio.run(ask_many(fleet, 4, kill, max_tokens=1500))
    fleet.start_router("--control-port", port)
    fleet.wait_serving()
    assert_whole(asyncio.run(ask_many(fleet, 4)))
    fleet.assert_balanced()


def test_garbage_on_every_socket_ends_nothing(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start()
    assert fleet.router is not None
    for port in listening_ports([fleet.router.pid, *(n.pid for n in fleet.nodes.values())]):
        for garbage in (b"\x00" * 64, b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + b"A" * 500):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(garbage)
    assert_whole(asyncio.run(ask_many(fleet, 2)))
    fleet.assert_balanced()


def listening_ports(pids: list[int]) -> list[int]:
    """TCP ports on which these processes listen, from /proc."""
    inodes = set()
    for pid in pids:
        for descriptor in os.listdir(f"/proc/{pid}/fd"):
            target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    ports = []
    with open("/proc/net/tcp") as table:
        for line in list(table)[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                ports.append(int(fields[1].split(":")[1], 16))
    assert len(ports) >= 5, "router: HTTP and control; nodes: HTTP, peers and data"
    return ports


def test_load_with_random_hang_ups_balances(make_fleet: MakeFleet) -> None:
    """Sixty requests of which a third hang up somewhere; nothing leaks, the others are whole."""
    fleet = make_fleet().start()

    async def storm() -> list[Answer]:
        async with Client(fleet.url) as client:

            async def one(index: int) -> Answer:
                await asyncio.sleep(0.02 * index)
                stop = 1 + index % 7 if index % 3 == 0 else None
                return await client.stream(
                    stop_after=stop,
                    model=MODEL,
                    prompt=f"class Thing{index % 10}:\n" * (1 + index % 9),
                    max_tokens=30,
                    seed=index,
                    ignore_eos=True,
                )

            return await asyncio.gather(*(one(index) for index in range(60)))

    answers = asyncio.run(storm())
    assert_whole([a for i, a in enumerate(answers) if i % 3], max_tokens=30)
    fleet.assert_balanced()
    for node in fleet.nodes.values():
        assert node.code is None
    assert_whole(asyncio.run(ask_many(fleet, 1)))
