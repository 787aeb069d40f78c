"""Units over ZMQ: PUSH on the prefill node, PULL on the decode node, two frames per unit.

    [header: an envelope with UnitHeader] [payload]

The payload is sent from the pool's memory without a copy, and received into its block with one
(libzmq cannot receive in place). Header, permission and copy happen in one call on the thread that
owns the lease table, so a lease cannot end in between.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from kvtransfer.transport import TransferStats, UnitSink
from wire.codec import MAX_MESSAGE_BYTES, Envelope, decode, encode
from wire.errors import MalformedMessage, TransferError, VersionMismatch
from wire.messages import UnitHeader
from wire.sockets import PolledSocket, bind
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

NAME = "zmq"
_OUTBOX_UNITS = 4096  # per peer; the windows of the handoffs keep it far lower
_SWEEP_S = 0.002  # how often finished zero-copy sends are looked for


class ZmqUnitSender:
    """One PUSH socket per decode node."""

    def __init__(self, me: NodeId, context: zmq.Context[Any]) -> None:
        self._me = me
        self._context = context
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._in_flight: deque[tuple[zmq.MessageTracker, Callable[[], None]]] = deque()
        self._sweeping = False

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        """See UnitSender."""
        frames: list[Any] = [encode(Envelope(self._me, to, header)), payload]
        try:
            tracker = self._socket(url).send_multipart(frames, zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            raise TransferError("transport", f"cannot send to {url}: {error}") from error
        assert tracker is not None, "asked to track"
        self._in_flight.append((tracker, on_done))
        self._sweep_later()

    def close(self) -> None:
        for socket in self._sockets.values():
            socket.close(0)
        self._sockets.clear()
        while self._in_flight:
            self._in_flight.popleft()[1]()

    def _socket(self, url: str) -> zmq.Socket[bytes]:
        socket = self._sockets.get(url)
        if socket is None:
            socket = self._sockets[url] = self._context.socket(zmq.PUSH)
            socket.sndhwm = _OUTBOX_UNITS
            socket.linger = 0
            socket.connect(url)
        return socket

    def _sweep_later(self) -> None:
        if self._in_flight and not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        waiting = deque[tuple[zmq.MessageTracker, Callable[[], None]]]()
        for tracker, on_done in self._in_flight:
            if tracker.done:
                on_done()
            else:
                waiting.append((tracker, on_done))
        self._in_flight = waiting
        self._sweep_later()


class ZmqUnitReceiver:
    """The PULL socket of a decode node."""

    def __init__(
        self,
        me: NodeId,
        url: str,
        sink: UnitSink,
        stats: TransferStats,
        context: zmq.Context[Any],
    ) -> None:
        self._me = me
        self._sink = sink
        self._stats = stats
        socket = context.socket(zmq.PULL)
        socket.maxmsgsize = MAX_MESSAGE_BYTES
        socket.rcvhwm = _OUTBOX_UNITS
        bind(socket, url)
        self.address = TransportAddress(NAME, socket.last_endpoint.decode().rstrip("\0"))
        self._polled = PolledSocket(socket, self._receive_one)

    def close(self) -> None:
        self._polled.close(linger_ms=0)

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        head = socket.recv(zmq.NOBLOCK)
        try:
            if socket.rcvmore:
                self._receive_payload(socket, head)
            else:
                self._stats.units_dropped["malformed"] += 1
        finally:
            while socket.rcvmore:  # nothing of this message may be taken for the next one
                socket.recv(zmq.NOBLOCK)

    def _receive_payload(self, socket: zmq.Socket[bytes], head: bytes) -> None:
        opened = self._open(head)
        landing = self._sink.begin(*opened) if opened else None
        if landing is None:
            socket.recv(zmq.NOBLOCK)
            return
        received = 0
        try:
            received = socket.recv_into(landing.view, flags=zmq.NOBLOCK)
        finally:
            landing.end(received)

    def _open(self, head: bytes) -> tuple[NodeId, UnitHeader] | None:
        try:
            envelope = decode(head)
        except (MalformedMessage, VersionMismatch) as error:
            self._stats.units_dropped["malformed"] += 1
            if self._stats.units_dropped["malformed"] == 1:
                log.warning("dropped a malformed unit: %s", error)
            return None
        if envelope.receiver != self._me or not isinstance(envelope.message, UnitHeader):
            self._stats.units_dropped["stale"] += 1
            return None
        return envelope.sender, envelope.message
