"""Nodes that change roles under load: nobody's stream breaks, and no text differs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.test_faults import ask_many, assert_whole, num_moved, until_busy

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


async def switch(fleet: Fleet, node: str, role: str, drain_s: float) -> None:
    async with Client(fleet.url) as client:
        body = {"node": node, "role": role, "drain_s": drain_s}
        async with client.session.post("/admin/role", json=body) as response:
            assert response.status == 202, await response.text()


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
