"""The decode node's end of `shm` and `cuda-ipc`: copies units out of other processes' pools."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from functools import partial

from kvtransfer.device_pool import ForeignPool, OpenPool
from kvtransfer.late_units import LateUnits
from kvtransfer.shared_memory import MappedMemory
from kvtransfer.shm_connection import MAX_PEERS, listen, receive_pool, same_user
from kvtransfer.shm_stream import ANSWER, PlacedUnit, UnitParser
from kvtransfer.transport import Landing, TransferStats, UnitSink
from wire.codec import Envelope
from wire.errors import WireError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

_READ_BYTES = 64 << 10
_TURN_BYTES = 8 << 20  # copied before the loop gets its turn again: about a millisecond
_UNIT_BYTES = 32 << 10  # what a unit costs besides its bytes, in bytes
_ANSWER_BYTES = 16 << 20  # an answer wakes the sender: a stream of units gets one for so many bytes
_PAUSE_S = 1.0  # without a free descriptor nobody is let in for so long


class ShmUnitReceiver:
    """The listening socket of a decode node, and the pools that it may read.

    Args:
        name: the transport's.
        open_pool: maps what a connection brings: host memory, or a device's.
    """

    def __init__(
        self,
        me: NodeId,
        sink: UnitSink,
        stats: TransferStats,
        *,
        name: str = "shm",
        open_pool: OpenPool = MappedMemory,
    ) -> None:
        self.open_pool = open_pool
        self._me = me
        self._sink = sink
        self._stats = stats
        self._loop = asyncio.get_running_loop()
        self._peers: set[_Peer] = set()
        self._listener, url = listen(name)
        self.address = TransportAddress(name, url)
        self._listen()

    @property
    def num_peers(self) -> int:
        return len(self._peers)

    def close(self) -> None:
        if self._listener.fileno() >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._listener)
        self._listener.close()
        for peer in list(self._peers):
            peer.close()

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            log.warning("cannot accept a connection: %s", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(_PAUSE_S, self._listen)
            return
        if len(self._peers) >= MAX_PEERS or not same_user(connection):
            self._stats.units_dropped["refused"] += 1
            connection.close()
            return
        connection.setblocking(False)
        self._peers.add(_Peer(connection, self))

    def forget(self, peer: _Peer) -> None:
        """Its connection has ended."""
        self._peers.discard(peer)

    def is_meant(self, greeting: Envelope) -> bool:
        """Whether a connection was opened to this process and not to an earlier one."""
        if greeting.receiver == self._me:
            return True
        self._stats.units_dropped["stale"] += 1
        return False

    def place(self, sender: NodeId, units: Iterable[tuple[UnitHeader, memoryview]]) -> None:
        """Put units where their leases say: first all places, then all bytes, then all ends.

        In turns with the copies, each of which fills the processor's cache with other things, the
        same few lines of Python take four times as long.
        """
        copies = [copy for header, source in units if (copy := self._begin(sender, header, source))]
        for copy in copies:
            copy.carry_out()
        for copy in copies:
            copy.end()

    def _begin(self, sender: NodeId, header: UnitHeader, source: memoryview) -> _Copy | None:
        landing = self.begin(sender, header)
        return _Copy(landing, source) if landing else None

    def begin(self, sender: NodeId, header: UnitHeader) -> Landing | None:
        """Where a unit goes; None: nowhere."""
        try:
            return self._sink.begin(sender, header)
        except Exception:  # a bug there must not end the connection for the others' units
            log.exception("a unit was not handled")
            return None

    def malformed(self, reason: object) -> None:
        """A connection is closed for what came over it."""
        self._stats.units_dropped["malformed"] += 1
        if self._stats.units_dropped["malformed"] == 1:
            log.warning("closed a connection that sent no units: %s", reason)


class _Copy:
    """One unit on its way to its place; a bug in what it meets stops no other one."""

    __slots__ = ("_landing", "_num_bytes", "_source")

    def __init__(self, landing: Landing, source: memoryview) -> None:
        self._landing = landing
        self._source = source
        self._num_bytes = 0  # copied

    def carry_out(self) -> None:
        try:
            self._landing.fill(self._source)
            self._num_bytes = len(self._source)
        except Exception:
            log.exception("a unit was not copied")

    def end(self) -> None:
        try:
            self._landing.end(self._num_bytes)
        except Exception:
            log.exception("a unit was not handled")


class _Peer:
    """One prefill node's connection."""

    def __init__(self, connection: socket.socket, receiver: ShmUnitReceiver) -> None:
        self._socket = connection
        self._receiver = receiver
        self._loop = asyncio.get_running_loop()
        self._sender: NodeId | None = None  # not known before the hello
        self._pool: ForeignPool | None = None
        self._late: LateUnits | None = None  # where the pool is a device's
        self._parser = UnitParser(0)
        self._over = 0  # units that are over and were not answered
        self._over_bytes = 0
        self._working = False
        self._closed = False
        self._loop.add_reader(connection, self._readable)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._late is not None:
            self._late.close()
        elif self._pool is not None:
            self._pool.close()
        self._receiver.forget(self)

    def _readable(self) -> None:
        if self._working:
            return  # the stream stays in the socket until what was read is done
        try:
            if self._pool is None:
                self._greet()
                return
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except WireError as error:
            self._receiver.malformed(error)
            self.close()
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._parser.feed(data)
        self._work()

    def _greet(self) -> None:
        greeting, self._pool = receive_pool(self._socket, self._receiver.open_pool)
        self._sender = greeting.sender
        self._parser = UnitParser(len(self._pool), self._pool.alignment)
        if self._pool.on_device:
            begin = partial(self._receiver.begin, self._sender)
            self._late = LateUnits(self._pool, begin, self._are_over)
        if not self._receiver.is_meant(greeting):
            self.close()

    def _work(self) -> None:
        """Take what was read, but leave the loop its turn: copies may be long."""
        self._working = False
        if self._closed:
            return
        units: list[PlacedUnit] = []
        budget = _TURN_BYTES
        try:
            while budget > 0 and (unit := self._parser.next()):
                units.append(unit)
                budget -= unit.header.num_bytes + _UNIT_BYTES
        except WireError as error:
            self._receiver.malformed(error)
            self.close()
            return
        self._working = budget <= 0
        if self._working:
            self._loop.call_soon(self._work)
        self._place(units)
        self._over_bytes += _TURN_BYTES - budget
        if not self._working or self._over_bytes >= _ANSWER_BYTES:
            self._answer()

    def _place(self, units: list[PlacedUnit]) -> None:
        if not units:
            return
        assert self._pool is not None
        assert self._sender is not None
        if self._late is not None:
            self._late.take(units)
            return
        pool = self._pool
        self._receiver.place(self._sender, [(unit.header, _source(unit, pool)) for unit in units])
        self._over += len(units)

    def _are_over(self, count: int) -> None:
        """Told of many in one turn of the loop; they are answered together."""
        if not self._over:
            self._loop.call_soon(self._answer)
        self._over += count

    def _answer(self) -> None:
        if not self._over or self._closed:
            return
        try:
            self._socket.send(ANSWER.pack(self._over))  # so few bytes go whole or not at all
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._answer_late)
        except OSError:
            self.close()
        else:
            self._over = self._over_bytes = 0

    def _answer_late(self) -> None:
        self._loop.remove_writer(self._socket)
        self._answer()


def _source(unit: PlacedUnit, pool: ForeignPool) -> memoryview:
    if unit.inline is not None:
        return memoryview(unit.inline)
    part = pool.part(unit.offset, unit.header.num_bytes)
    assert isinstance(part, memoryview)
    return part
