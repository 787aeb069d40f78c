"""A node's link to a router, against a real bound socket and a clock that the tests move."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import zmq

from node.router_link import RouterLink
from wire.codec import Envelope
from wire.curve import FleetContext
from wire.fleet_key import make_key
from wire.fleet_messages import (
    FetchTokenizer,
    Gone,
    Goodbye,
    Heartbeat,
    ModelInfo,
    Register,
    RouterHeartbeat,
    Unwelcome,
    Welcome,
)
from wire.layout import KVLayout
from wire.messages import Message
from wire.request_messages import Abort
from wire.sockets import Hub
from wire.types import AttemptId, NodeId, NodeLoad, Role

NODE = NodeId("decode-0", 5)
HEARTBEAT = Heartbeat(NodeLoad())
REGISTER = Register(
    role=Role.DECODE,
    model=ModelInfo("m", "f", "n", 64, 32, (0,)),
    layout=KVLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32"),
    num_blocks=8,
    peer_url="tcp://127.0.0.1:1",
    transports=(),
    http_url="http://127.0.0.1:1",
)


class Router:
    """One life of a router: hears everything, says what a test tells it to."""

    def __init__(self, context: zmq.Context[Any], incarnation: int, url: str) -> None:
        self.me = NodeId("router", incarnation)
        self.heard: list[Message] = []
        self.hub = Hub(self.me, url, self._receive, context)

    def _receive(self, envelope: Envelope) -> None:
        self.heard.append(envelope.message)

    def tell(self, message: Message) -> None:
        self.hub.send(NODE, message)

    def num_heard(self, kind: type[Message]) -> int:
        return sum(isinstance(message, kind) for message in self.heard)


@dataclass
class World:
    """A link and what it called."""

    context: zmq.Context[Any]
    hub_context: zmq.Context[Any] | None = None
    now: float = 100.0
    got: list[Message] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    routers: list[Router] = field(default_factory=list)

    def router(self, incarnation: int = 1, url: str = "tcp://127.0.0.1:*") -> Router:
        self.routers.append(Router(self.hub_context or self.context, incarnation, url))
        return self.routers[-1]

    def link_to(self, url: str) -> RouterLink:
        self.link = RouterLink(
            NODE,
            url,
            REGISTER,
            on_message=lambda link, message: self.got.append(message),
            on_welcome=lambda link: self.events.append("welcome"),
            on_lost=lambda link: self.events.append("lost"),
            on_unwelcome=lambda reason: self.events.append(reason),
            context=self.context,
            clock=lambda: self.now,
        )
        return self.link

    async def registered(self, heartbeat_s: float = 0.5) -> tuple[Router, RouterLink]:
        """A router and a link that it has welcomed."""
        router = self.router()
        link = self.link_to(router.hub.url)
        await self.beat_until(lambda: router.num_heard(Register))
        router.tell(Welcome(heartbeat_s))
        await until(lambda: link.registered)
        return router, link

    async def beat_until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self.link.beat(HEARTBEAT)
                await asyncio.sleep(0.005)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    context: zmq.Context[Any] = zmq.Context()
    made = World(context)
    try:
        yield made
    finally:
        made.link.close()
        for router in made.routers:
            router.hub.close()
        context.term()


@contextmanager
def recorded(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The warnings that the link logs meanwhile."""
    caplog.clear()
    texts: list[str] = []
    with caplog.at_level(logging.WARNING, "node.router_link"):
        yield texts
        texts += [record.message for record in caplog.records]


def test_registers_again_until_it_is_welcomed() -> None:
    async def scenario() -> None:
        async with world() as w:
            router = w.router()
            link = w.link_to(router.hub.url)
            assert not link.send(HEARTBEAT)
            await w.beat_until(lambda: router.num_heard(Register) >= 3)
            assert not link.registered
            assert router.heard[0] == REGISTER
            router.tell(Welcome(0.25))
            await until(lambda: link.registered)
            assert w.events == ["welcome"]
            assert link.heartbeat_s == 0.25
            router.tell(Welcome(0.25))  # the answer to an earlier Register
            await w.beat_until(lambda: router.num_heard(Heartbeat) >= 3)
            assert w.events == ["welcome"]

    asyncio.run(scenario())


def test_it_may_start_before_its_router() -> None:
    async def scenario() -> None:
        async with world() as w:
            first = w.router()
            url = first.hub.url
            first.hub.close()
            link = w.link_to(url)
            for _ in range(5):
                link.beat(HEARTBEAT)
            await asyncio.sleep(0.05)
            router = await rebind(w, 2, url)
            await w.beat_until(lambda: router.num_heard(Register))

    asyncio.run(scenario())


async def rebind(w: World, incarnation: int, url: str) -> Router:
    """A router where another one was a moment ago."""
    async with asyncio.timeout(20):
        while True:
            try:
                return w.router(incarnation, url)
            except Exception:
                await asyncio.sleep(0.01)


def test_gets_messages_of_its_router_only() -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            abort = Abort(AttemptId("r", 1))
            for message in (RouterHeartbeat(), FetchTokenizer(), abort):
                router.tell(message)
            await until(lambda: len(w.got) == 2)
            assert w.got == [FetchTokenizer(), abort]
            router.hub._inbox.me = NodeId("router", 99)  # says to be somebody else
            router.tell(abort)
            router.hub._inbox.me = router.me
            router.tell(FetchTokenizer())
            await until(lambda: len(w.got) == 3)
            assert w.got[-1] == FetchTokenizer()
            assert link.registered

    asyncio.run(scenario())


@pytest.mark.parametrize("known", [True, False])
def test_gone_means_that_the_router_knows_nothing(known: bool) -> None:
    """Whether it is a later life that answers, or the same one that gave this node up."""

    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            if not known:
                router.hub._inbox.me = NodeId("router", 2)
            router.tell(Gone(router.me))
            await until(lambda: not link.registered)
            assert w.events == ["welcome", "lost"]
            before = router.num_heard(Register)
            await w.beat_until(lambda: router.num_heard(Register) > before)
            router.tell(Welcome(0.5))
            await until(lambda: link.registered)
            assert w.events == ["welcome", "lost", "welcome"]

    asyncio.run(scenario())


def test_gone_for_a_life_that_it_does_not_know_is_ignored() -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            router.hub._inbox.me = NodeId("router", 3)
            router.tell(Gone(NodeId("router", 4)))
            router.hub._inbox.me = router.me
            router.tell(FetchTokenizer())
            await until(lambda: w.got)
            assert link.registered

    asyncio.run(scenario())


def test_a_welcome_of_the_next_life_ends_the_former() -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            router.hub._inbox.me = NodeId("router", 2)
            router.tell(Welcome(0.5))
            await until(lambda: len(w.events) == 3)
            assert w.events == ["welcome", "lost", "welcome"]
            assert link.send(HEARTBEAT)

    asyncio.run(scenario())


def test_a_router_that_goes_is_lost_quietly_and_found_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            with recorded(caplog) as warnings:
                router.hub.close()
                await w.beat_until(lambda: not link.registered)
                link.beat(HEARTBEAT)
            assert w.events == ["welcome", "lost"]
            assert not warnings
            with recorded(caplog) as warnings:
                w.now += 100
                link.beat(HEARTBEAT)
                link.beat(HEARTBEAT)
            assert len(warnings) == 1, "absence is said, and once"
            successor = await rebind(w, 2, router.hub.url)
            await w.beat_until(lambda: successor.num_heard(Register))
            successor.tell(Welcome(0.5))
            await until(lambda: link.registered)

    asyncio.run(scenario())


def test_silence_is_loss(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            pass_time(w, link, 4.5)
            router.tell(RouterHeartbeat())
            router.tell(FetchTokenizer())
            await until(lambda: w.got)
            pass_time(w, link, 4.5)
            assert link.registered
            with recorded(caplog) as warnings:
                pass_time(w, link, 1)
            assert not link.registered
            assert w.events[-1] == "lost"
            assert "silent" in warnings[0]

    asyncio.run(scenario())


def pass_time(w: World, link: RouterLink, seconds: float) -> None:
    """Beat as the shell does while time passes."""
    for _ in range(int(seconds / 0.5)):
        w.now += 0.5
        link.beat(HEARTBEAT)


def test_a_router_that_beats_slowly_is_not_silent() -> None:
    async def scenario() -> None:
        async with world() as w:
            _, link = await w.registered(heartbeat_s=10)
            pass_time(w, link, 25)
            assert link.registered
            pass_time(w, link, 10)
            assert not link.registered
            assert link.heartbeat_s < 1, "registers at its own pace"

    asyncio.run(scenario())


def test_its_own_pause_is_not_the_routers_silence() -> None:
    async def scenario() -> None:
        async with world() as w:
            _, link = await w.registered()
            link.beat(HEARTBEAT)
            w.now += 60  # the process was stopped
            link.beat(HEARTBEAT)
            assert link.registered
            pass_time(w, link, 6)
            assert not link.registered

    asyncio.run(scenario())


def test_what_is_read_after_a_pause_may_be_old() -> None:
    """Also what comes in small pieces after the first beat; and no longer than that."""

    async def scenario() -> None:
        async with world() as w:
            _, link = await w.registered()
            pass_time(w, link, 5)
            assert not link.reads_backlog
            w.now += 3  # the process was stopped
            assert link.reads_backlog, "before its own first beat"
            link.beat(HEARTBEAT)
            assert link.reads_backlog
            pass_time(w, link, 0.5)
            assert not link.reads_backlog

    asyncio.run(scenario())


def test_unwelcome_says_why() -> None:
    async def scenario() -> None:
        async with world() as w:
            router = w.router()
            link = w.link_to(router.hub.url)
            await w.beat_until(lambda: router.num_heard(Register))
            router.tell(Unwelcome("another model is served here"))
            await until(lambda: w.events)
            assert w.events == [
                f"router {router.hub.url} refused this node: another model is served here"
            ]
            assert not link.registered

    asyncio.run(scenario())


def test_a_closed_link_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with world() as w:
            router, link = await w.registered()
            with recorded(caplog) as warnings:
                assert link.send(Goodbye())
                link.close()
                assert not link.send(HEARTBEAT)
                link.beat(HEARTBEAT)
            assert not warnings
            assert w.events == ["welcome"]
            await until(lambda: router.num_heard(Goodbye))

    asyncio.run(scenario())


def test_a_router_with_another_key_is_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def body() -> None:
        keyed, naked = FleetContext(make_key()), FleetContext()
        w = World(naked, hub_context=keyed)
        try:
            router = w.router()
            link = w.link_to(router.hub.url)
            await w.beat_until(lambda: keyed.num_refused >= 3 and link._refusal_told)
            w.now += 100
            await w.beat_until(lambda: keyed.num_refused >= 5)
            assert not link.registered
            assert not router.heard
        finally:
            link.close()
            router.hub.close()
            keyed.destroy(0)
            naked.destroy(0)

    with caplog.at_level(logging.WARNING, logger="node"):
        asyncio.run(body())
    told = [record.getMessage() for record in caplog.records if record.name == "node.router_link"]
    assert len(told) == 1
    assert "does not let this node in: it wants a fleet key (--key-file)" in told[0]
