"""The prefill node's end of `shm` and `cuda-ipc`: says where in its pool its units lie."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.device_pool import Pool
from kvtransfer.shm_connection import connect, is_here
from kvtransfer.shm_stream import ANSWER, INLINE, MAX_INLINE_BYTES
from kvtransfer.transport import OnLost
from kvtransfer.unit_header import pack
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

_GATHER = 64  # buffers per system call
_READ_BYTES = 4096
_WATCH_S = 0.5  # how often stalled lanes are looked for
_IDLE_S = 300.0  # a lane unused for so long is closed when another one is opened


@dataclass(slots=True, eq=False)
class _Lane:
    """The connection to one decode node, and the sends that are not over, in order."""

    url: str
    socket: socket.socket
    moved_at: float  # when a send ended, or the first one began
    outbox: deque[memoryview] = field(default_factory=deque)
    in_flight: deque[Callable[[], None]] = field(default_factory=deque)
    answers: bytearray = field(default_factory=bytearray)  # the start of one
    flush_due: bool = False
    lost: bool = False

    def left(self, num_bytes: int) -> None:
        """So many bytes of the outbox are on their way."""
        while num_bytes:
            first = self.outbox[0]
            if num_bytes < len(first):
                self.outbox[0] = first[num_bytes:]
                return
            num_bytes -= len(first)
            self.outbox.popleft()


class ShmUnitSender:
    """One connection per decode node of this host.

    Args:
        pool: the memory that full units lie in.
        name: the transport's.
        on_lost: told of a lane that ended with units on the way.
        stall_s: a decode node that takes no unit for so long loses its lane, which gives the
            blocks back.
    """

    def __init__(
        self,
        me: NodeId,
        pool: Pool,
        *,
        name: str = "shm",
        on_lost: OnLost | None = None,
        stall_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._pool = pool
        self._name = name
        self._on_lost = on_lost
        self._stall_s = stall_s
        self._clock = clock
        self._lanes: dict[tuple[str, NodeId], _Lane] = {}
        self._watching = False
        self._loop = asyncio.get_running_loop()

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender. Connects where it is not connected yet."""
        if not is_here(url):
            return False
        self._lane(url, to)
        return True

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview | DeviceBytes,
        on_done: Callable[[], None],
    ) -> None:
        """See UnitSender and DeviceUnitSender."""
        lane = self._lane(url, to)
        offset = self._pool.offset_of(payload)
        inline = payload if offset is None else memoryview(b"")
        if isinstance(inline, DeviceBytes) or inline.nbytes > MAX_INLINE_BYTES:
            raise TransferError("transport", f"{inline.nbytes} bytes outside of the pool")
        lane.outbox.append(memoryview(pack(header, INLINE if offset is None else offset)))
        if inline.nbytes:
            lane.outbox.append(inline)
        if not lane.in_flight:
            lane.moved_at = self._clock()
        lane.in_flight.append(on_done)
        self._flush_later(lane)
        self._watch_later()

    def close(self) -> None:
        for lane in list(self._lanes.values()):
            self._close_lane(lane)
        self._lanes.clear()

    # ------------------------------------------------------------ lanes

    def _lane(self, url: str, to: NodeId) -> _Lane:
        """The lane to `to`; that it was lost is said once, and the next call connects again."""
        lane = self._lanes.get((url, to))
        if lane is None:
            return self._open_lane(url, to)
        if lane.lost:
            del self._lanes[url, to]
            raise TransferError("transport", f"the connection to {url} was lost")
        return lane

    def _open_lane(self, url: str, to: NodeId) -> _Lane:
        self._close_idle()
        peer = connect(url, self._me, to, self._pool)
        lane = self._lanes[url, to] = _Lane(url, peer, self._clock())
        self._loop.add_reader(lane.socket, self._receive_answers, lane)
        return lane

    def _close_idle(self) -> None:
        horizon = self._clock() - _IDLE_S
        for key, lane in list(self._lanes.items()):
            if not lane.in_flight and lane.moved_at < horizon:
                self._close_lane(lane)
                del self._lanes[key]

    def _close_lane(self, lane: _Lane) -> None:
        """End all its sends; shm_transport.py says why that is safe."""
        if lane.lost:
            return
        lane.lost = True
        if not self._loop.is_closed():
            self._loop.remove_reader(lane.socket)
            self._loop.remove_writer(lane.socket)
        lane.socket.close()
        lane.outbox.clear()
        _call_all(_taken(lane.in_flight, len(lane.in_flight)))

    def _lose(self, lane: _Lane, reason: object) -> None:
        # With nothing on the way it is only a decode node that has ended, as nodes do.
        carried = bool(lane.in_flight)
        level = logging.WARNING if carried else logging.INFO
        log.log(level, "lost the connection to %s: %s", lane.url, reason)
        self._close_lane(lane)
        if carried and self._on_lost is not None:
            error = TransferError("transport", f"{lane.url} took units and is gone")
            self._on_lost(TransportAddress(self._name, lane.url), error)

    def _watch_later(self) -> None:
        if not self._watching and any(lane.in_flight for lane in self._lanes.values()):
            self._watching = True
            self._loop.call_later(_WATCH_S, self._watch)

    def _watch(self) -> None:
        self._watching = False
        horizon = self._clock() - self._stall_s
        for lane in list(self._lanes.values()):
            if lane.in_flight and lane.moved_at <= horizon:
                self._lose(lane, f"it takes no units, {len(lane.in_flight)} were on the way")
        self._watch_later()

    # ------------------------------------------------------------ bytes

    def _flush_later(self, lane: _Lane) -> None:
        """Units that are sent in one go leave with one system call."""
        if not lane.flush_due:
            lane.flush_due = True
            self._loop.call_soon(self._flush, lane)

    def _flush(self, lane: _Lane) -> None:
        try:
            while lane.outbox:
                lane.left(lane.socket.sendmsg(list(islice(lane.outbox, _GATHER))))
        except BlockingIOError:
            self._loop.add_writer(lane.socket, self._flush, lane)
            return
        except OSError as error:
            if not lane.lost:
                self._lose(lane, error)
            return
        if lane.flush_due and not lane.lost:
            lane.flush_due = False
            self._loop.remove_writer(lane.socket)

    def _receive_answers(self, lane: _Lane) -> None:
        try:
            data = lane.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(lane, error)
            return
        lane.answers += data
        whole = len(lane.answers) // ANSWER.size * ANSWER.size
        count = sum(number for (number,) in ANSWER.iter_unpack(lane.answers[:whole]))
        del lane.answers[:whole]
        if not data or count > len(lane.in_flight):
            self._lose(lane, "it was closed" if not data else "it answers what was not asked")
            return
        lane.moved_at = self._clock()
        _call_all(_taken(lane.in_flight, count))


def _taken(queue: deque[Callable[[], None]], count: int) -> list[Callable[[], None]]:
    return [queue.popleft() for _ in range(count)]


def _call_all(callbacks: Iterable[Callable[[], None]]) -> None:
    for on_done in callbacks:
        try:
            on_done()
        except Exception:  # a bug in one must not keep the other blocks
            log.exception("the end of a send was not handled")
