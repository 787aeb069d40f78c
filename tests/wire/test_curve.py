"""Who gets in: hubs, links and units between holders of one key, of two, and of none."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import zmq

from tests.wire.test_sockets import ANY_PORT, NODE, ROUTER, abort, until
from wire import curve, sockets
from wire.codec import Envelope, encode
from wire.curve import SILENCE, FleetContext, knock
from wire.errors import ConfigError, WireError
from wire.fleet_key import FleetKey, make_key
from wire.sockets import Hub, Link

OURS = make_key()
THEIRS = make_key()
NOT_TAKEN = "it does not take this process's fleet key (--key-file)"
WANTS_ONE = "it wants a fleet key (--key-file) and this process has none"
STRANGERS = [
    pytest.param(OURS, THEIRS, NOT_TAKEN, id="another key"),
    pytest.param(OURS, None, WANTS_ONE, id="no key"),
    pytest.param(None, OURS, NOT_TAKEN, id="hub without key"),
]


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 60))


@contextmanager
def contexts(*keys: FleetKey | None) -> Iterator[list[FleetContext]]:
    made = [FleetContext(key) for key in keys]
    try:
        yield made
    finally:
        for context in made:
            context.destroy(0)


@pytest.mark.parametrize("key", [OURS, None], ids=["with a key", "without"])
def test_who_has_the_key_is_heard_in_both_directions(key: FleetKey | None) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        answers: list[Envelope] = []
        refusals: list[str] = []
        with contexts(key, key) as (here, there):
            hub = Hub(ROUTER, ANY_PORT, heard.append, here)
            link = Link(NODE, hub.url, answers.append, there, on_refused=refusals.append)
            for number in range(100):
                link.send(abort(number), ROUTER)
            await until(lambda: len(heard) == 100)
            hub.send(NODE, abort(7))
            await until(lambda: answers)
            assert here.num_refused == 0
            assert not refusals
            link.close()
            hub.close()

    run(body())


@pytest.mark.parametrize(("hub_key", "link_key", "reason"), STRANGERS)
def test_a_stranger_is_not_heard_and_told_why(
    hub_key: FleetKey | None, link_key: FleetKey | None, reason: str
) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        refusals: list[str] = []
        with contexts(hub_key, link_key) as (here, there):
            hub = Hub(ROUTER, ANY_PORT, heard.append, here)
            link = Link(NODE, hub.url, heard.append, there, on_refused=refusals.append)
            for number in range(10):
                link.send(abort(number), None)
            await until(lambda: len(refusals) >= 2)  # it tries again
            assert set(refusals) == {reason}
            if hub_key is not None:
                await until(lambda: here.num_refused)
            assert not heard
            link.close()
            hub.close()

    run(body())


def test_who_knows_only_the_public_half_does_not_get_in() -> None:
    """CURVE alone would let it in: this is what the door is for."""

    async def body() -> None:
        heard: list[Envelope] = []
        with contexts(OURS, None) as (here, there):
            hub = Hub(ROUTER, ANY_PORT, heard.append, here)
            thief = there.socket(zmq.DEALER)
            thief.routing_id = f"{NODE.incarnation:x}.{NODE.name}".encode()
            thief.curve_publickey, thief.curve_secretkey = zmq.curve_keypair()
            thief.curve_serverkey = OURS.public
            thief.connect(hub.url)
            thief.send(encode(Envelope(NODE, ROUTER, abort(1))))
            await until(lambda: here.num_refused)
            assert not heard
            hub.close()

    run(body())


def test_strangers_are_counted_and_the_first_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        with contexts(OURS, THEIRS) as (here, there):
            hubs = [Hub(ROUTER, ANY_PORT, lambda _: None, here) for _ in range(2)]
            links = [Link(NODE, hub.url, lambda _: None, there) for hub in hubs]
            await until(lambda: here.num_refused >= 4)
            for link, hub in zip(links, hubs, strict=True):
                link.close()
                hub.close()

    with caplog.at_level(logging.WARNING):
        run(body())
    assert len(caplog.records) == 1
    assert "another fleet key" in caplog.text


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00" * 50, b"\xff" * 200])
def test_who_speaks_no_zmtp_is_not_heard_and_disturbs_nobody(greeting: bytes) -> None:
    """ZMTP 1.0, which has no greeting, is no way around the key either."""

    async def body() -> None:
        heard: list[Envelope] = []
        with contexts(OURS, OURS) as (here, there):
            hub = Hub(ROUTER, ANY_PORT, heard.append, here)
            with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2]))) as other:
                other.sendall(greeting)
                link = Link(NODE, hub.url, heard.append, there)
                link.send(abort(1), None)
                await until(lambda: heard)
            assert heard == [Envelope(NODE, None, abort(1))]
            assert hub.num_malformed == 0
            link.close()
            hub.close()

    run(body())


@pytest.mark.parametrize("key", [OURS, None], ids=["with a key", "without"])
def test_who_does_not_finish_the_handshake_holds_no_memory_for_long(
    monkeypatch: pytest.MonkeyPatch, key: FleetKey | None
) -> None:
    """It has begun a command of 100 MB, which libzmq must hold until it is whole."""
    monkeypatch.setattr(curve, "_HANDSHAKE_MS", 300)

    async def body() -> None:
        with contexts(key) as (here,):
            hub = Hub(ROUTER, ANY_PORT, lambda envelope: None, here)
            port = int(hub.url.rpartition(":")[2])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            mechanism = (b"CURVE" if key else b"NULL").ljust(20, b"\0")
            writer.write(b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism + bytes(32))
            writer.write(b"\x06" + (100 << 20).to_bytes(8, "big") + bytes(1 << 16))
            async with asyncio.timeout(20):
                with suppress(ConnectionResetError):
                    await reader.read(-1)  # until the hub hangs up
            writer.close()
            hub.close()

    run(body())


def test_a_link_gets_in_as_soon_as_the_hub_takes_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself libzmq never connects again to a place that spoke another mechanism."""
    monkeypatch.setattr(sockets, "_CONNECT_AGAIN_S", 0.05)

    async def body() -> None:
        heard: list[Envelope] = []
        refusals: list[str] = []
        with contexts(None, OURS, OURS) as (before, after, there):
            hub = Hub(ROUTER, ANY_PORT, heard.append, before)
            link = Link(
                NODE,
                hub.url,
                heard.append,
                there,
                queue_while_away=False,
                on_refused=refusals.append,
            )
            await until(lambda: refusals)
            hub.close()
            successor = await bound_again(hub.url, heard.append, after)
            while not heard:
                try:
                    link.send(abort(1), None)
                except WireError:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)
            link.close()
            successor.close()

    run(body())


async def refused(context: FleetContext) -> None:
    await until(lambda: context.num_refused)


async def bound_again(url: str, handler: Callable[[Envelope], None], context: FleetContext) -> Hub:
    while True:
        try:
            return Hub(ROUTER, url, handler, context)
        except ConfigError:  # the port is still held for a moment
            await asyncio.sleep(0.01)


def test_ends_in_any_order_leave_nothing_behind() -> None:
    async def body() -> None:
        for hub_first in (True, False):
            here, there = FleetContext(OURS), FleetContext(THEIRS)
            hub = Hub(ROUTER, ANY_PORT, lambda _: None, here)
            link = Link(NODE, hub.url, lambda _: None, there, on_refused=lambda _: None)
            await refused(here)
            for end in (hub, link) if hub_first else (link, hub):
                end.close()
                end.close()
            await asyncio.to_thread(here.term)
            there.destroy(0)
        context = FleetContext(OURS)
        Hub(ROUTER, ANY_PORT, lambda _: None, context)
        Link(NODE, "tcp://127.0.0.1:1", lambda _: None, context, on_refused=lambda _: None)
        context.destroy(0)  # which closes all of it

    run(body())
    gc.collect()  # an unclosed socket or context would warn now, and a warning is an error


# ---------------------------------------------------------------- before there is a loop


@pytest.mark.parametrize(("hub_key", "own_key", "reason"), STRANGERS)
def test_a_knock_tells_what_is_wrong(
    hub_key: FleetKey | None, own_key: FleetKey | None, reason: str
) -> None:
    async def body() -> None:
        with contexts(hub_key) as (here,):
            hub = Hub(ROUTER, ANY_PORT, lambda _: None, here)
            assert await asyncio.to_thread(knock, hub.url, hub_key, 20) is None
            assert await asyncio.to_thread(knock, hub.url, own_key, 20) == reason
            hub.close()

    run(body())


def test_a_knock_at_nobodys_door_ends() -> None:
    assert knock("tcp://127.0.0.1:1", OURS, 0.1) == SILENCE


# ---------------------------------------------------------------- IPv6


def ipv6_works() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
def test_hubs_and_links_over_ipv6() -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        with contexts(OURS, OURS) as (here, there):
            hub = Hub(ROUTER, "tcp://[::1]:*", heard.append, here)
            link = Link(NODE, hub.url, heard.append, there)
            link.send(abort(1), None)
            await until(lambda: heard)
            assert await asyncio.to_thread(knock, hub.url, OURS, 20) is None
            link.close()
            hub.close()

    run(body())
