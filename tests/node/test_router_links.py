"""A node and the workers of a router: it finds them all by itself, and gives up those that go."""

from __future__ import annotations

import asyncio

from tests.node.test_shell import Router, World, node
from wire.fleet_messages import Draining, Gone, Goodbye, Heartbeat, Register, Welcome
from wire.types import NodeId


def port(router: Router) -> int:
    return int(router.hub.url.rpartition(":")[2])


def second_router(w: World) -> Router:
    """A worker beside the world's router, whose port is not told yet."""
    made = Router(w.shell.context)
    made.me = made.hub._inbox.me = NodeId("router", 2)
    return made


def test_a_node_finds_the_workers_that_a_welcome_tells() -> None:
    async def scenario() -> None:
        async with node(Gone(NodeId("router", 1))) as w:  # it is not let in yet
            other = second_router(w)
            both = Welcome(0.05, (port(w.router), port(other)))
            w.router.answer = other.answer = both
            await w.until_ready()
            await w.until(lambda: other.count(Heartbeat) > 1 and w.router.count(Heartbeat) > 1)
            w.shell.stop()
            assert await w.end() == 0
            await asyncio.sleep(0.05)
            for router in (w.router, other):
                assert [router.count(Draining), router.count(Goodbye)] == [1, 1]
            other.hub.close()

    asyncio.run(scenario())


def test_it_is_ready_once_all_have_welcomed_it() -> None:
    async def scenario() -> None:
        async with node(Gone(NodeId("router", 1))) as w:
            other = second_router(w)
            w.router.answer = Welcome(0.05, (port(w.router), port(other)))
            other.answer = Gone(other.me)
            await w.until(lambda: w.router.count(Heartbeat) > 2 and other.count(Register) > 2)
            assert not w.ready
            other.answer = w.router.answer
            await w.until_ready()
            other.hub.close()

    asyncio.run(scenario())


def test_a_worker_that_is_told_no_longer_is_given_up() -> None:
    async def scenario() -> None:
        async with node(Gone(NodeId("router", 1))) as w:
            other = second_router(w)
            w.router.answer = other.answer = Welcome(0.05, (port(w.router), port(other)))
            await w.until_ready()
            w.router.answer = Welcome(0.05)  # it was started again, alone
            w.router.tell(Gone(w.router.me))
            await w.until(lambda: other.count(Goodbye) == 1)
            assert w.role.calls.count("router lost") == 2
            assert [link.url for link in w.shell._links] == [w.router.hub.url]
            heard = len(other.heard)
            await w.until(lambda: w.router.count(Heartbeat) > 5)
            assert len(other.heard) == heard
            other.hub.close()

    asyncio.run(scenario())
