"""Hub and link over TCP on this machine: what arrives, what is refused, what a full outbox does."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import msgpack
import pytest
import zmq

from wire import codec, sockets
from wire.codec import Envelope, encode
from wire.errors import ConfigError, OutboxFull, VersionMismatch, WireError
from wire.fleet_messages import FetchTokenizer, Gone, Heartbeat, TokenizerFiles
from wire.messages import PROTOCOL_VERSION, Message
from wire.request_messages import Abort
from wire.sockets import Hub, Inbox, Link
from wire.types import AttemptId, NodeId, NodeLoad

ANY_PORT = "tcp://127.0.0.1:*"
ROUTER = NodeId("router", 0xA)
NODE = NodeId("node", 0xB)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def abort(number: int) -> Abort:
    return Abort(AttemptId("r", number))


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(body, 30))


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110  what is waited for happens on other threads
        await asyncio.sleep(0.002)


def repeat(send: Callable[[], None]) -> None:
    for _ in range(1000):
        send()


class Peer:
    """A bare DEALER socket that says whatever a test wants."""

    def __init__(self, context: zmq.Context[Any], url: str, me: NodeId) -> None:
        self.me = me
        self.socket = context.socket(zmq.DEALER)
        self.socket.routing_id = f"{me.incarnation:x}.{me.name}".encode()
        self.socket.rcvhwm = 1
        self.socket.connect(url)

    def say(self, message: Message, *, sender: NodeId | None = None, to: NodeId | None) -> None:
        self.socket.send(encode(Envelope(sender or self.me, to, message)))


async def hub_and_link(
    context: zmq.Context[Any], heard: list[Envelope], answers: list[Envelope]
) -> tuple[Hub, Link]:
    hub = Hub(ROUTER, ANY_PORT, heard.append, context)
    link = Link(NODE, hub.url, answers.append, context)
    link.send(Heartbeat(NodeLoad()), ROUTER)
    await until(lambda: heard)
    heard.clear()
    return hub, link


def test_both_directions_in_order_and_beyond_one_burst(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        answers: list[Envelope] = []
        hub, link = await hub_and_link(context, heard, answers)
        for number in range(1000):
            link.send(abort(number), ROUTER)
            hub.send(NODE, abort(number))
        await until(lambda: len(heard) == len(answers) == 1000)
        assert heard == [Envelope(NODE, ROUTER, abort(n)) for n in range(1000)]
        assert answers == [Envelope(ROUTER, NODE, abort(n)) for n in range(1000)]
        hub.close()
        link.close()

    run(body())


def test_a_send_from_within_a_handler_loses_no_message(context: zmq.Context[Any]) -> None:
    """The descriptor is edge-triggered, and a send takes the edge: the socket must look again."""

    async def body() -> None:
        heard: list[Envelope] = []

        def echo(envelope: Envelope) -> None:
            hub.send(envelope.sender, envelope.message)

        hub = Hub(ROUTER, ANY_PORT, echo, context)
        link = Link(NODE, hub.url, heard.append, context)
        for number in range(300):
            link.send(abort(number), ROUTER)
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: len(heard) == 300)
        hub.close()
        link.close()

    run(body())


async def rebound(url: str, me: NodeId, heard: list[Envelope], context: zmq.Context[Any]) -> Hub:
    """A hub on a port that the closed hub before it may still hold for a moment."""
    while True:
        try:
            return Hub(me, url, heard.append, context)
        except ConfigError:
            await asyncio.sleep(0.01)


def test_a_link_finds_the_hub_again_and_learns_that_the_old_one_is_gone(
    context: zmq.Context[Any],
) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        answers: list[Envelope] = []
        hub, link = await hub_and_link(context, heard, answers)
        hub.close()
        successor = await rebound(hub.url, NodeId("router", 0xC), heard, context)
        while not answers:  # what the old connection had taken is lost with it
            link.send(abort(1), ROUTER)
            await asyncio.sleep(0.01)
        assert answers[0].sender == NodeId("router", 0xC)
        assert answers[0].message == Gone(ROUTER)
        assert heard == []
        link.send(abort(2), None)  # whoever listens
        await until(lambda: heard)
        assert [envelope.message for envelope in heard] == [abort(2)]
        successor.close()
        link.close()

    run(body())


def test_a_link_of_an_earlier_life_is_answered_gone_by_its_successor(
    context: zmq.Context[Any],
) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        hub = Hub(ROUTER, ANY_PORT, heard.append, context)
        peer = Peer(context, hub.url, NODE)
        link = Link(NodeId("other", 1), hub.url, heard.append, context)
        link.send(abort(1), NodeId("router", 0xDEAD))
        peer.say(Gone(NodeId("router", 0xDEAD)), to=NodeId("router", 0xDEAD))
        await until(lambda: len(heard) == 2)
        assert {type(envelope.message) for envelope in heard} == {Gone}  # never a Gone for a Gone
        hub.close()
        link.close()
        peer.socket.close(0)

    run(body())


def test_what_is_wrong_is_counted_and_complained_of_once(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        heard: list[Envelope] = []
        hub = Hub(ROUTER, ANY_PORT, heard.append, context)
        peer = Peer(context, hub.url, NODE)
        for _ in range(5):
            peer.say(FetchTokenizer(), sender=NodeId("somebody else", 1), to=ROUTER)
            peer.socket.send(b"\x00 no message")
            peer.socket.send(b"")
        peer.say(abort(1), to=ROUTER)
        await until(lambda: heard)
        assert [envelope.message for envelope in heard] == [abort(1)]
        assert hub.num_malformed == 15
        hub.close()
        peer.socket.close(0)

    run(body())
    assert len(caplog.records) == 3
    assert any("not who the socket says" in record.message for record in caplog.records)


def test_another_version_is_told_to_both_ends(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an upgrade of one of them; both go on asking and answering."""

    async def body() -> None:
        heard: list[Envelope] = []
        refused: list[str] = []
        hub = Hub(ROUTER, ANY_PORT, heard.append, context)
        link = Link(NODE, hub.url, heard.append, context, on_refused=refused.append)

        def in_version_77(envelope: Envelope) -> bytes:
            data = encode(envelope)
            if envelope.sender != NODE:
                return data
            parts = msgpack.unpackb(data, strict_map_key=False)
            return bytes(msgpack.packb([77, *parts[1:]]))

        monkeypatch.setattr(sockets, "encode", in_version_77)
        real = codec.decode

        def decode_as_77(data: bytes) -> Envelope:
            if msgpack.unpackb(data, strict_map_key=False)[2] == ROUTER.name:
                raise VersionMismatch(f"peer speaks version {PROTOCOL_VERSION}, this node 77")
            return real(data)

        monkeypatch.setattr(sockets, "decode", decode_as_77)
        link.send(abort(1), None)
        await until(lambda: refused)
        assert refused == [f"peer speaks version {PROTOCOL_VERSION}, this node 77"]
        assert (hub.num_malformed, heard) == (1, [])
        link.close()
        hub.close()

    with caplog.at_level(logging.WARNING):
        run(body())
    assert f"peer speaks version 77, this node {PROTOCOL_VERSION}" in caplog.text


def test_endless_reasons_are_neither_kept_nor_logged(caplog: pytest.LogCaptureFixture) -> None:
    inbox = Inbox(ROUTER, lambda _: None, lambda *_: None)
    for tag in range(1000, 1300):
        head = bytes([0x97, PROTOCOL_VERSION, 0xCD]) + tag.to_bytes(2, "big")
        inbox.receive(head + b"\xa1a\x01\xc0\x00\x80", None)
    assert inbox.num_malformed == 300
    assert len(caplog.records) == 100


def test_an_answer_that_cannot_be_sent_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """Else a peer that never reads could fill the log with tracebacks."""

    def full(to: NodeId, message: Message) -> None:
        raise OutboxFull("it never reads")

    inbox = Inbox(ROUTER, lambda _: None, full)
    with caplog.at_level(logging.WARNING):
        inbox.receive(encode(Envelope(NODE, NodeId("router", 1), abort(1))), None)
    assert not caplog.records


def test_a_handler_that_fails_does_not_end_the_loop(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        heard: list[Message] = []

        def handler(envelope: Envelope) -> None:
            heard.append(envelope.message)
            if envelope.message == abort(0):
                raise ValueError("a bug")

        hub = Hub(ROUTER, ANY_PORT, handler, context)
        link = Link(NODE, hub.url, lambda _: None, context)
        for number in range(3):
            link.send(abort(number), ROUTER)
        await until(lambda: len(heard) == 3)
        hub.close()
        link.close()

    run(body())
    assert [record.message for record in caplog.records] == ["a message handler failed"]


def test_a_peer_that_never_reads_fills_its_own_outbox_only(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_OUTBOX_MESSAGES", 10)

    async def body() -> None:
        heard: list[Envelope] = []
        answers: list[Envelope] = []
        hub, link = await hub_and_link(context, heard, answers)
        deaf = Peer(context, hub.url, NodeId("deaf", 1))
        deaf.say(Heartbeat(NodeLoad()), to=ROUTER)
        await until(lambda: heard)
        large = TokenizerFiles(bytes(1 << 18), b"")
        with pytest.raises(OutboxFull, match="deaf"):
            repeat(lambda: hub.send(NodeId("deaf", 1), large))
        hub.send(NODE, abort(1))
        await until(lambda: answers)
        hub.close()
        link.close()
        deaf.socket.close(0)

    run(body())


def test_a_hub_that_stays_away_fills_the_outbox(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_OUTBOX_MESSAGES", 10)

    async def body() -> None:
        link = Link(NODE, "tcp://127.0.0.1:1", lambda _: None, context)
        with pytest.raises(OutboxFull, match=r"127\.0\.0\.1:1"):
            repeat(lambda: link.send(abort(1), None))
        link.close()

    run(body())


def test_sends_to_nobody_and_after_the_end_are_wire_errors(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        hub = Hub(ROUTER, ANY_PORT, lambda _: None, context)
        link = Link(NODE, hub.url, lambda _: None, context)
        with pytest.raises(WireError, match="stranger"):
            hub.send(NodeId("stranger", 1), abort(1))
        for end in (hub, link):
            end.close()
            end.close()
        with pytest.raises(WireError):
            hub.send(NODE, abort(1))
        with pytest.raises(WireError):
            link.send(abort(1), ROUTER)

    run(body())


def test_lives_with_long_names_are_told_apart(context: zmq.Context[Any]) -> None:
    """A routing id has 255 bytes at most; a name may have more."""

    async def body() -> None:
        heard: list[Envelope] = []
        answers: dict[int, list[Envelope]] = {1: [], 2: []}
        hub = Hub(ROUTER, ANY_PORT, heard.append, context)
        lives = [NodeId("é" * 256, life) for life in (1, 2)]
        links = [Link(life, hub.url, answers[life.incarnation].append, context) for life in lives]
        for link in links:
            link.send(abort(1), ROUTER)
        await until(lambda: len(heard) == 2)
        for life in lives:
            hub.send(life, abort(life.incarnation))
        await until(lambda: answers[1] and answers[2])
        assert [answers[life][0].message for life in (1, 2)] == [abort(1), abort(2)]
        assert hub.num_malformed == 0
        hub.close()
        for link in links:
            link.close()

    run(body())


@pytest.mark.parametrize(
    "url", ["tcp://127.0.0.1:99999", "nonsense", "tcp://192.0.2.1:1", "smoke://signal"]
)
def test_an_impossible_address_is_one_clear_line(context: zmq.Context[Any], url: str) -> None:
    async def body() -> None:
        with pytest.raises(ConfigError, match=r"^cannot listen on '.*': [^\n]+$"):
            Hub(ROUTER, url, lambda _: None, context)

    run(body())


def test_an_address_in_use_or_without_meaning(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        hub = Hub(ROUTER, ANY_PORT, lambda _: None, context)
        with pytest.raises(ConfigError, match=r"cannot listen on .*in use"):
            Hub(ROUTER, hub.url, lambda _: None, context)
        for url in ("smoke://signal", "tcp://127.0.0.1:99999"):
            with pytest.raises(ConfigError, match=f"cannot connect to '{url}'"):
                Link(NODE, url, lambda _: None, context)
        hub.close()

    run(body())


def test_closing_in_order_leaves_nothing_behind() -> None:
    async def body() -> None:
        context = zmq.Context()
        heard: list[Envelope] = []
        hub, link = await hub_and_link(context, heard, [])
        link.send(abort(1), ROUTER)  # a last word, still under way
        link.close()
        await until(lambda: heard)
        hub.close()
        context.term()

    run(body())
    gc.collect()  # an unclosed socket or context would warn now, and a warning is an error


def test_a_terminated_context_ends_its_sockets(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        context = zmq.Context()
        hub = Hub(ROUTER, ANY_PORT, lambda _: None, context)
        ending = threading.Thread(target=context.term, daemon=True)
        ending.start()
        await until(lambda: not ending.is_alive())
        hub.close()

    run(body())
    assert not caplog.records


def test_a_context_destroyed_first_leaves_no_reader_in_the_loop() -> None:
    async def body() -> None:
        context = zmq.Context()
        hub = Hub(ROUTER, ANY_PORT, lambda _: None, context)
        descriptor = hub._polled._fd
        context.destroy(0)
        hub.close()
        assert not asyncio.get_running_loop().remove_reader(descriptor)

    run(body())
