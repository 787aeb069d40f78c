"""Units over ZMQ: PUSH on the prefill node, PULL on the decode node, two frames per unit.

    [header: an envelope with UnitHeader] [payload]

The payload is sent from the pool's memory without a copy, and received into its block with one
(libzmq cannot receive in place). Header, permission and copy happen in one call on the thread that
owns the lease table, so a lease cannot end in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import zmq

from kvtransfer.transport import TransferStats, UnitSink
from wire.codec import MAX_MESSAGE_BYTES, Envelope, decode, encode
from wire.errors import ConfigError, MalformedMessage, TransferError, VersionMismatch
from wire.handoff_messages import UnitHeader
from wire.polled import PolledSocket
from wire.sockets import bind, connect
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

NAME = "zmq"
_INBOX_UNITS = 256  # per peer; what waits beyond it stays in the sender's own pool
_SWEEP_S = 0.002  # how often finished zero-copy sends are looked for
_IDLE_S = 300.0  # a lane unused for so long is closed when another one is opened
_LAST_SWEEP_S = 1.0  # how long `close` waits for libzmq to let go of the pool's memory


@dataclass(slots=True)
class _Lane:
    """The socket to one decode node, and the sends that still read this node's memory, in order."""

    socket: zmq.Socket[bytes]
    moved_at: float  # when a send ended, or the first one began
    in_flight: deque[tuple[zmq.MessageTracker, Callable[[], None]]] = field(default_factory=deque)

    def sweep(self, now: float) -> None:
        """Let go of what has left, oldest first."""
        while self.in_flight and self.in_flight[0][0].done:
            _, on_done = self.in_flight.popleft()
            self.moved_at = now
            on_done()


class ZmqUnitSender:
    """One PUSH socket per decode node.

    Args:
        stall_s: a decode node that takes no unit for so long loses its lane: a send cannot be
            revoked, and closing the socket is the only way to get the blocks back.
    """

    def __init__(
        self,
        me: NodeId,
        context: zmq.Context[Any],
        *,
        stall_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._context = context
        self._stall_s = stall_s
        self._clock = clock
        self._lanes: dict[str, _Lane] = {}
        self._closing: list[_Lane] = []
        self._sweeping = False

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender. Always: ZMQ connects when it can, and says nothing where it cannot."""
        return True

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
            lane = self._lanes.get(url) or self._open_lane(url)
            tracker = lane.socket.send_multipart(frames, zmq.NOBLOCK, copy=False, track=True)
        except (zmq.ZMQError, ConfigError) as error:
            raise TransferError("transport", f"cannot send to {url}: {error}") from error
        assert tracker is not None, "asked to track"
        if not lane.in_flight:
            lane.moved_at = self._clock()
        lane.in_flight.append((tracker, on_done))
        self._sweep_later()

    def close(self) -> None:
        for url in list(self._lanes):
            self._close_lane(url)
        patience = time.monotonic() + _LAST_SWEEP_S
        for lane in self._closing:
            for tracker, on_done in lane.in_flight:
                with suppress(zmq.NotDone):  # then the pool ends with sends under way
                    tracker.wait(max(0.0, patience - time.monotonic()))
                on_done()
            lane.in_flight.clear()
        self._closing.clear()

    def _open_lane(self, url: str) -> _Lane:
        now = self._clock()
        for other, lane in list(self._lanes.items()):
            if not lane.in_flight and now - lane.moved_at > _IDLE_S:
                self._close_lane(other)
        socket = self._context.socket(zmq.PUSH)
        # The windows of the handoffs bound what waits here, and it waits in the pool: of payloads
        # under 64 KiB pyzmq would send copies, which nobody counts.
        socket.sndhwm = 0
        socket.copy_threshold = 0
        socket.linger = 0
        connect(socket, url)
        self._lanes[url] = lane = _Lane(socket, now)
        return lane

    def _close_lane(self, url: str) -> None:
        lane = self._lanes.pop(url)
        lane.socket.close(0)
        if lane.in_flight:
            self._closing.append(lane)

    def _sweep_later(self) -> None:
        if not self._sweeping and (self._closing or any(x.in_flight for x in self._lanes.values())):
            self._sweeping = True
            asyncio.get_running_loop().call_later(_SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        now = self._clock()
        try:
            for lane in (*self._lanes.values(), *self._closing):
                lane.sweep(now)
        finally:
            self._close_stalled(now)
            self._closing = [lane for lane in self._closing if lane.in_flight]
            self._sweep_later()

    def _close_stalled(self, now: float) -> None:
        for url, lane in list(self._lanes.items()):
            if lane.in_flight and now - lane.moved_at >= self._stall_s:
                log.warning("%s takes no units; dropped %d", url, len(lane.in_flight))
                self._close_lane(url)


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
        socket.rcvhwm = _INBOX_UNITS
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
