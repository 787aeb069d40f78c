"""The two ends of a connection between processes, in an asyncio loop, a callback per message.

`Hub` (ROUTER, bound) talks to many peers, `Link` (DEALER, connected) to one hub. Both check what
they receive before anybody sees it: the codec checks the bytes, the routing id must name the
sender, and a message that was meant for an earlier life of this process is answered `Gone`
(messages that were queued for a dead process do reach its successor on the same port). A link that
speaks another version of the protocol is answered in the hub's own, so that both can say so. In a
`FleetContext` with a key both ends must prove it (see `wire.curve`).
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import zmq

from wire.codec import MAX_MESSAGE_BYTES, Envelope, decode, encode
from wire.curve import FleetContext, Watch, refusal
from wire.errors import ConfigError, MalformedMessage, OutboxFull, VersionMismatch, WireError
from wire.fleet_messages import Gone, Unwelcome
from wire.messages import Message
from wire.polled import LINGER_MS, PolledSocket
from wire.types import NodeId

log = logging.getLogger(__name__)

Handler = Callable[[Envelope], None]
Answer = Callable[[NodeId, Message], None]
OnMismatch = Callable[[str, bytes | None], None]

_OUTBOX_MESSAGES = 4096  # per peer; beyond it `send` raises OutboxFull
_CONNECT_AGAIN_S = 1.0  # libzmq does not try again where the other side wants other keys


class Inbox:
    """Decodes and checks what arrives for one process life; counts what it drops.

    Args:
        on_mismatch: called with the reason and the routing id for messages of another version.
    """

    def __init__(
        self,
        me: NodeId,
        on_message: Handler,
        answer: Answer,
        on_mismatch: OnMismatch = lambda reason, routing_id: None,
    ):
        self.me = me
        self.on_message = on_message
        self.num_malformed = 0
        self._answer = answer
        self._on_mismatch = on_mismatch
        self._complained: set[str] = set()

    def receive(self, data: bytes, routing_id: bytes | None) -> None:
        """Give the message in `data` to the handler, or answer `Gone`, or drop it."""
        try:
            envelope = decode(data)
            if routing_id is not None and routing_id != _routing_id(envelope.sender):
                raise MalformedMessage("the sender is not who the socket says")
        except (MalformedMessage, VersionMismatch) as error:
            self._complain(str(error), routing_id)
            if isinstance(error, VersionMismatch):
                self._on_mismatch(str(error), routing_id)
            return
        meant_for = envelope.receiver
        if meant_for is None or meant_for == self.me or isinstance(envelope.message, Gone):
            self.on_message(envelope)
        else:
            self._answer_gone(envelope.sender, meant_for)

    def _answer_gone(self, sender: NodeId, meant_for: NodeId) -> None:
        try:
            self._answer(sender, Gone(meant_for))
        except WireError as error:  # it asks again, or is gone itself
            log.debug("could not answer %s: %s", sender, error)

    def _complain(self, reason: str, routing_id: bytes | None) -> None:
        """Count every one, log the first of its kind (an attacker must not fill disk or memory)."""
        self.num_malformed += 1
        reason = reason[:500]
        if len(self._complained) < 100 and reason not in self._complained:
            self._complained.add(reason)
            log.warning("dropped a message from %r: %s", routing_id, reason)


class Hub:
    """A bound ROUTER socket: the place where many peers talk to this process."""

    def __init__(self, me: NodeId, url: str, on_message: Handler, context: zmq.Context[Any]):
        self._inbox = Inbox(me, on_message, self.send, self._answer_version)
        socket = context.socket(zmq.ROUTER)
        socket.router_mandatory = True
        socket.router_handover = True  # a peer that reconnects replaces its old connection
        _set_limits(socket)
        bind(socket, url)
        self.url = socket.last_endpoint.decode().rstrip("\0")
        self._polled = PolledSocket(socket, self._receive_one)

    @property
    def num_malformed(self) -> int:
        return self._inbox.num_malformed

    def send(self, to: NodeId, message: Message) -> None:
        """Queue `message` for a connected peer.

        Raises:
            OutboxFull: the peer does not read.
            WireError: no such peer is connected.
        """
        data = encode(Envelope(self._inbox.me, to, message))
        try:
            self._polled.send([_routing_id(to), data])
        except zmq.Again as error:
            raise OutboxFull(f"{to} does not read its messages") from error
        except zmq.ZMQError as error:
            raise WireError(f"{to} is not connected: {error}") from error

    def close(self) -> None:
        self._polled.close()

    def _answer_version(self, reason: str, routing_id: bytes | None) -> None:
        """Whatever it says, the peer reads the number in front of it."""
        data = encode(Envelope(self._inbox.me, None, Unwelcome(reason)))
        with suppress(zmq.ZMQError):  # it does not read, or has left
            self._polled.send([routing_id or b"", data])

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        self._inbox.receive(frames[-1], frames[0])


class Link:
    """A DEALER socket connected to one hub; reconnects by itself while the hub is away.

    Args:
        queue_while_away: keep messages for a hub that is not connected (yet); else `send` raises.
        on_refused: called with the reason whenever the hub and this process do not accept each
            other's key, or speak different versions; the link tries again.
    """

    def __init__(
        self,
        me: NodeId,
        url: str,
        on_message: Handler,
        context: zmq.Context[Any],
        *,
        queue_while_away: bool = True,
        on_refused: Callable[[str], None] | None = None,
    ):
        self._inbox = Inbox(
            me,
            on_message,
            lambda to, message: self.send(message, to),
            lambda reason, _: None if on_refused is None else on_refused(reason),
        )
        self.url = url
        socket = context.socket(zmq.DEALER)
        socket.routing_id = _routing_id(me)
        socket.reconnect_ivl = 100
        socket.reconnect_ivl_max = 1000
        socket.immediate = not queue_while_away
        _set_limits(socket)
        self._socket = socket
        self._keyed = isinstance(context, FleetContext) and context.key is not None
        self._on_refused = on_refused
        self._again: asyncio.TimerHandle | None = None
        self._watch = None if on_refused is None else Watch(socket, self._refused)
        connect(socket, url)
        self._polled = PolledSocket(socket, self._receive_one)

    @property
    def num_malformed(self) -> int:
        return self._inbox.num_malformed

    def send(self, message: Message, to: NodeId | None) -> None:
        """Queue `message` for the hub, meant for its life `to` (None: whichever listens).

        Raises:
            OutboxFull: the hub has been away or not reading for too long.
            WireError: the link is closed.
        """
        data = encode(Envelope(self._inbox.me, to, message))
        try:
            self._polled.send([data])
        except zmq.Again as error:
            raise OutboxFull(f"{self.url} does not read its messages") from error
        except zmq.ZMQError as error:
            raise WireError(f"the link to {self.url} is closed: {error}") from error

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        if self._watch is not None:
            self._watch.close()
        self._polled.close()

    def _refused(self, event: int) -> None:
        reason = refusal(event, keyed=self._keyed)
        if reason is not None and self._on_refused is not None:
            self._on_refused(reason)
        if event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and self._again is None:
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(_CONNECT_AGAIN_S, self._connect_again)

    def _connect_again(self) -> None:
        self._again = None
        if not self._socket.closed:
            with suppress(zmq.ZMQError):  # libzmq has given the address up by itself
                self._socket.disconnect(self.url)
            self._socket.connect(self.url)

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        self._inbox.receive(frames[-1], None)


def bind(socket: zmq.Socket[bytes], url: str) -> None:
    """Bind, or close the socket and say in one line what is wrong with the address."""
    try:
        _prepare(socket, url)
        if isinstance(socket.context, FleetContext):
            socket.context.guard_server(socket)
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot listen on {url!r}: {error.strerror}") from error


def connect(socket: zmq.Socket[bytes], url: str) -> None:
    """Connect, or close the socket and say in one line what is wrong with the address."""
    try:
        _prepare(socket, url)
        if isinstance(socket.context, FleetContext):
            socket.context.guard_client(socket)
        socket.connect(url)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot connect to {url!r}: {error.strerror}") from error


def _prepare(socket: zmq.Socket[bytes], url: str) -> None:
    """libzmq takes 99999 for 99999 mod 65536, and must be told of IPv6."""
    if "[" in url:
        socket.ipv6 = True
    port = url.rpartition(":")[2]
    if port.isdigit() and int(port) > 0xFFFF:
        raise zmq.ZMQError(errno.EINVAL, "there is no such port")


def _set_limits(socket: zmq.Socket[bytes]) -> None:
    socket.sndhwm = _OUTBOX_MESSAGES
    socket.rcvhwm = _OUTBOX_MESSAGES
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.linger = LINGER_MS


def _routing_id(node: NodeId) -> bytes:
    """At most 255 bytes; the incarnation goes first, so that a long name cannot push it out."""
    return f"{node.incarnation:x}.{node.name}".encode()[:255]
