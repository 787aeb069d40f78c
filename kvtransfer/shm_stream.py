"""What two processes say over the socket of the shm transport, after the hello.

    unit    [header and place, UNIT][bytes of the unit, where its place is INLINE]
    answer  [u32: so many more units are over]         in the order in which they came

The place in a unit's header (`unit_header`) is an offset in the sender's pool.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvtransfer.unit_header import UNIT, unpack
from wire.errors import MalformedMessage
from wire.handoff_messages import UnitHeader

ANSWER = struct.Struct("<I")
INLINE = (1 << 64) - 1
MAX_INLINE_BYTES = 64 << 20


class PlacedUnit(NamedTuple):
    """A unit, and where its bytes are: at `offset` of the sender's pool, or here."""

    header: UnitHeader
    offset: int
    inline: bytearray | None


class UnitParser:
    """Cuts a stream into units; holds at most one unit's inline bytes and what was read with them.

    Args:
        pool_bytes: the size of the sender's pool.
        alignment: of places in it.
    """

    def __init__(self, pool_bytes: int, alignment: int = 1) -> None:
        self._pool_bytes = pool_bytes
        self._alignment = alignment
        self._buffer = bytearray()
        self._start = 0  # of what is left of it
        self._head: tuple[UnitHeader, int] | None = None  # its inline bytes are to come

    def feed(self, data: bytes) -> None:
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data

    def next(self) -> PlacedUnit | None:
        """The next unit, if all of it is here.

        Raises:
            MalformedMessage: this is no such stream; nothing after it can be understood.
        """
        head = self._head or self._next_head()
        if head is None:
            return None
        header, place = head
        inline = None
        if place == INLINE:
            inline = self._take(header.num_bytes)
            self._head = head if inline is None else None
            if inline is None:
                return None
        return PlacedUnit(header, place, inline)

    def _next_head(self) -> tuple[UnitHeader, int] | None:
        if len(self._buffer) - self._start < UNIT.size:
            return None
        header, place = unpack(self._buffer, self._start)
        self._start += UNIT.size
        limit = MAX_INLINE_BYTES if place == INLINE else self._pool_bytes - place
        if header.num_bytes > limit:
            raise MalformedMessage("a unit that is larger than its place")
        if place != INLINE and place % self._alignment:
            raise MalformedMessage("a unit at an odd place")
        return header, place

    def _take(self, num_bytes: int) -> bytearray | None:
        end = self._start + num_bytes
        if len(self._buffer) < end:
            return None
        taken = self._buffer[self._start : end]
        self._start = end
        return taken
