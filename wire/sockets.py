"""ZMQ sockets in an asyncio loop: synchronous sends that never block, a callback per message.

`Hub` (ROUTER, bound) talks to many peers, `Link` (DEALER, connected) to one hub. Both check what
they receive before anybody sees it: the codec checks the bytes, the routing id must name the
sender, and a message that was meant for an earlier life of this process is answered `Gone`
(messages that were queued for a dead process do reach its successor on the same port).

Why not zmq.asyncio: its receive costs a future and two loop turns per message, and its send is a
future as well; here a message costs one call, and a full outbox is an exception where it is sent.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from wire.codec import MAX_MESSAGE_BYTES, Envelope, decode, encode
from wire.errors import ConfigError, MalformedMessage, OutboxFull, VersionMismatch, WireError
from wire.messages import Gone, Message
from wire.types import NodeId

log = logging.getLogger(__name__)

Handler = Callable[[Envelope], None]
Answer = Callable[[NodeId, Message], None]

_BURST = 64  # messages handled before the loop gets its turn again
_OUTBOX_MESSAGES = 4096  # per peer; beyond it `send` raises OutboxFull
_LINGER_MS = 300  # how long `close` may take to deliver a last word


class PolledSocket:
    """Calls `receive_one(socket)` from the running loop for every waiting message.

    ZMQ's file descriptor is edge-triggered: it tells of a change, not of a state. So reading goes
    on until the socket is empty, and every send looks again (a send may swallow the edge).
    """

    def __init__(self, socket: zmq.Socket[bytes], receive_one: Callable[[zmq.Socket[bytes]], None]):
        self._socket = socket
        self._receive_one = receive_one
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._fd = socket.fileno()  # kept, because a socket that its context closed has none
        self._loop.add_reader(self._fd, self._drain)
        self._schedule()

    def send(self, frames: Sequence[Any], *, copy: bool = True, track: bool = False) -> Any:
        """Queue one message. Raises zmq.Again where the outbox is full, and never blocks."""
        try:
            return self._socket.send_multipart(frames, zmq.NOBLOCK, copy=copy, track=track)
        finally:
            self._schedule()

    def close(self, linger_ms: int = _LINGER_MS) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._socket.close(linger_ms)

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                self._receive_one(self._socket)
            except zmq.Again:
                return
            except zmq.ContextTerminated:
                self.close(0)
            except Exception:  # a bug in a handler must not end the process
                log.exception("a message handler failed")
        self._schedule()


class Inbox:
    """Decodes and checks what arrives for one process life; counts what it drops."""

    def __init__(self, me: NodeId, on_message: Handler, answer: Answer):
        self.me = me
        self.on_message = on_message
        self.num_malformed = 0
        self._answer = answer
        self._complained: set[str] = set()

    def receive(self, data: bytes, routing_id: bytes | None) -> None:
        """Give the message in `data` to the handler, or answer `Gone`, or drop it."""
        try:
            envelope = decode(data)
            if routing_id is not None and routing_id != _routing_id(envelope.sender):
                raise MalformedMessage("the sender is not who the socket says")
        except (MalformedMessage, VersionMismatch) as error:
            self._complain(str(error), routing_id)
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
        self._inbox = Inbox(me, on_message, self.send)
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

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        self._inbox.receive(frames[-1], frames[0])


class Link:
    """A DEALER socket connected to one hub; reconnects by itself while the hub is away.

    Args:
        queue_while_away: keep messages for a hub that is not connected (yet); else `send` raises.
    """

    def __init__(
        self,
        me: NodeId,
        url: str,
        on_message: Handler,
        context: zmq.Context[Any],
        *,
        queue_while_away: bool = True,
    ):
        self._inbox = Inbox(me, on_message, lambda to, message: self.send(message, to))
        self.url = url
        socket = context.socket(zmq.DEALER)
        socket.routing_id = _routing_id(me)
        socket.reconnect_ivl = 100
        socket.reconnect_ivl_max = 1000
        socket.immediate = not queue_while_away
        _set_limits(socket)
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
        self._polled.close()

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        frames = socket.recv_multipart(zmq.NOBLOCK)
        self._inbox.receive(frames[-1], None)


def bind(socket: zmq.Socket[bytes], url: str) -> None:
    """Bind, or close the socket and say in one line what is wrong with the address."""
    try:
        _check_port(url)
        socket.bind(url)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot listen on {url!r}: {error.strerror}") from error


def connect(socket: zmq.Socket[bytes], url: str) -> None:
    """Connect, or close the socket and say in one line what is wrong with the address."""
    try:
        _check_port(url)
        socket.connect(url)
    except zmq.ZMQError as error:
        socket.close(0)
        raise ConfigError(f"cannot connect to {url!r}: {error.strerror}") from error


def _check_port(url: str) -> None:
    """libzmq takes 99999 for 99999 mod 65536."""
    port = url.rpartition(":")[2]
    if port.isdigit() and int(port) > 0xFFFF:
        raise zmq.ZMQError(errno.EINVAL, "there is no such port")


def _set_limits(socket: zmq.Socket[bytes]) -> None:
    socket.sndhwm = _OUTBOX_MESSAGES
    socket.rcvhwm = _OUTBOX_MESSAGES
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.linger = _LINGER_MS


def _routing_id(node: NodeId) -> bytes:
    """At most 255 bytes; the incarnation goes first, so that a long name cannot push it out."""
    return f"{node.incarnation:x}.{node.name}".encode()[:255]
