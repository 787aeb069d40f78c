"""Nodes that change roles under load: nobody's stream breaks, and no text differs."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import pytest

from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.test_faults import ask_many, assert_whole, num_moved, until_busy
from tests.e2e.test_stalls import continued

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


async def switch(fleet: Fleet, node: str, role: str, drain_s: float) -> None:
    async with Client(fleet.url) as client:
        body = {"node": node, "role": role, "drain_s": drain_s}
        async with client.session.post("/admin/role", json=body) as response:
            assert response.status == 202, await response.text()


async def role_of(fleet: Fleet, node: str) -> str | None:
    """As the router knows it; None where it has given the node up."""
    async with Client(fleet.url) as client, client.session.get("/debug/fleet") as response:
        nodes = (await response.json())["nodes"]
    return next((str(told["role"]) for told in nodes if told["name"] == node), None)


async def until_it_drains(fleet: Fleet, node: str) -> None:
    """By its own word: the router's view changes with the order."""
    async with Client(fleet.nodes[node].url) as client, asyncio.timeout(60):
        while True:
            async with client.session.get("/ready") as response:
                if response.status == 503:
                    return


async def outcome(fleet: Fleet) -> dict[str, Any]:
    """How the last switch went, once it is over."""
    async with Client(fleet.url) as client, asyncio.timeout(120):
        while True:
            async with client.session.get("/debug/fleet") as response:
                told: dict[str, Any] = (await response.json())["role_switches"][-1]
            if told["outcome"]:
                return told
            await asyncio.sleep(0.05)


def test_there_and_back_under_load(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(prefill=1, decode=2)
    undisturbed = asyncio.run(ask_many(fleet, 8))
    assert_whole(undisturbed)
    before = fleet.nodes["decode-0"].metrics()["baton_sampled_tokens_total"]

    async def there() -> None:
        await until_busy(fleet, "decode-0", before + 40)
        await switch(fleet, "decode-0", "prefill", drain_s=0)
        assert (await outcome(fleet))["outcome"] == "done"

    async def back() -> None:
        await switch(fleet, "decode-0", "decode", drain_s=30)
        assert (await outcome(fleet))["outcome"] == "done"

    for disturb in (there, back):
        moved = num_moved(fleet)
        answers = asyncio.run(ask_many(fleet, 8, disturb))
        assert_whole(answers)
        assert [a.text for a in answers] == [a.text for a in undisturbed]
        assert disturb is back or num_moved(fleet) > moved, "it disturbed nobody"
        fleet.assert_balanced()
    blocks = fleet.nodes["decode-0"].metrics()['baton_blocks{state="cached"}']
    assert blocks > 0, "its prefix cache has outlived both lives"


def test_a_node_that_is_killed_while_it_drains(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(prefill=1, decode=2)
    undisturbed = asyncio.run(ask_many(fleet, 6))

    before = fleet.nodes["decode-1"].metrics()["baton_sampled_tokens_total"]

    async def disturb() -> None:
        await until_busy(fleet, "decode-1", before + 20)
        await switch(fleet, "decode-1", "prefill", drain_s=60)
        fleet.kill("decode-1")
        assert (await outcome(fleet))["outcome"] == "died"

    answers = asyncio.run(ask_many(fleet, 6, disturb))
    assert_whole(answers)
    assert [a.text for a in answers] == [a.text for a in undisturbed]
    fleet.assert_balanced()


def test_a_node_that_stands_still_while_it_drains_and_one_that_never_heard_of_it(
    make_fleet: MakeFleet,
) -> None:
    """Both are given up, and the fleet goes on.

    What had begun comes to its end later; an order that was given up meanwhile is not followed.
    """
    fleet = make_fleet()
    fleet.start_router("--node-timeout-s", "1.5")
    for role, name in (("prefill", "first"), ("decode", "other"), ("decode", "node")):
        fleet.start_node(role, name)
    for process in fleet.nodes.values():
        process.wait_ready()
    fleet.wait_for_nodes()
    undisturbed = asyncio.run(ask_many(fleet, 6))
    node = fleet.nodes["node"]
    before = node.metrics()["baton_sampled_tokens_total"]

    async def stand_still_draining() -> None:
        await until_busy(fleet, "node", before + 20)
        await switch(fleet, "node", "prefill", drain_s=60)
        await until_it_drains(fleet, "node")
        node.send(signal.SIGSTOP)
        assert (await outcome(fleet))["outcome"] == "died"

    async def stand_still_before() -> None:
        node.send(signal.SIGSTOP)
        await switch(fleet, "node", "decode", drain_s=60)
        assert (await outcome(fleet))["outcome"] == "died"

    for disturb in (stand_still_draining, stand_still_before):
        with continued(node):
            answers = asyncio.run(ask_many(fleet, 6, disturb))
            assert asyncio.run(role_of(fleet, "node")) is None
        fleet.wait_for_nodes()
        assert asyncio.run(role_of(fleet, "node")) == "prefill"
        assert_whole(answers)
        assert [a.text for a in answers] == [a.text for a in undisturbed]
        fleet.assert_balanced()
