"""What two processes say over the socket of the shm transport, after the hello.

    unit    [bytes of the header u32][place u64][header][bytes of the unit, where place is INLINE]
    answer  [u32: so many more units are over]                   in the order in which they came

The header is an envelope with UnitHeader; the place is an offset in the pool.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from wire.codec import Envelope, decode
from wire.errors import MalformedMessage
from wire.messages import UnitHeader
from wire.types import NodeId

FRAME = struct.Struct("<IQ")
ANSWER = struct.Struct("<I")
INLINE = (1 << 64) - 1
MAX_INLINE_BYTES = 64 << 20
_MAX_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PlacedUnit:
    """A unit, and where its bytes are: at `offset` of the sender's pool, or here."""

    sender: NodeId
    receiver: NodeId | None
    header: UnitHeader
    offset: int
    inline: bytearray | None


class UnitParser:
    """Cuts a stream into units; holds at most one unit's inline bytes and what was read with them.

    Args:
        pool_bytes: the size of the sender's pool.
    """

    def __init__(self, pool_bytes: int) -> None:
        self._pool_bytes = pool_bytes
        self._buffer = bytearray()
        self._head: tuple[Envelope, UnitHeader, int] | None = None  # its inline bytes are to come

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> PlacedUnit | None:
        """The next unit, if all of it is here.

        Raises:
            WireError: this is no such stream; nothing after it can be understood.
        """
        if self._head is None:
            self._head = self._next_head()
        if self._head is None:
            return None
        envelope, header, place = self._head
        inline = None
        if place == INLINE:
            if len(self._buffer) < header.num_bytes:
                return None
            inline = self._take(header.num_bytes)
        self._head = None
        return PlacedUnit(envelope.sender, envelope.receiver, header, place, inline)

    def _next_head(self) -> tuple[Envelope, UnitHeader, int] | None:
        if len(self._buffer) < FRAME.size:
            return None
        num_bytes, place = FRAME.unpack_from(self._buffer)
        if num_bytes > _MAX_HEADER_BYTES:
            raise MalformedMessage(f"a header of {num_bytes} bytes")
        if len(self._buffer) < FRAME.size + num_bytes:
            return None
        envelope = decode(bytes(self._take(FRAME.size + num_bytes)[FRAME.size :]))
        header = envelope.message
        if not isinstance(header, UnitHeader):
            raise MalformedMessage("not a unit's header")
        limit = MAX_INLINE_BYTES if place == INLINE else self._pool_bytes - place
        if header.num_bytes > limit:
            raise MalformedMessage("a unit that is larger than its place")
        return envelope, header, place

    def _take(self, num_bytes: int) -> bytearray:
        taken = self._buffer[:num_bytes]
        del self._buffer[:num_bytes]
        return taken
