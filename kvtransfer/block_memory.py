"""The block pool as a transfer sees it: units are read out of it and written into it.

Both may take their time where the blocks are a device's: then the caller is told in the event loop
when it is done. In the host's own memory it is done at once, and nothing is copied that lies in one
piece.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from kvtransfer.digest import content_of
from kvtransfer.relay import gather, layers_of, place_of, scatter
from kvtransfer.units import Unit
from wire.layout import KVLayout
from wire.types import BlockHandle


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """Memory of a device, at an address that only the device can read."""

    address: int
    nbytes: int

    def __len__(self) -> int:
        return self.nbytes


class HeldUnit(NamedTuple):
    """A unit, and the blocks of this node that hold it (`relay.blocks_of`)."""

    unit: Unit
    blocks: tuple[int, ...]


class ArrivedUnit(NamedTuple):
    """A unit whose bytes have arrived, and the block that they are of."""

    unit: Unit
    block: int
    data: memoryview | DeviceBytes
    content: bytes | None = None  # XXH3-128 of the bytes, where it is known already


TellRead: TypeAlias = Callable[[int, memoryview | None, bytes], None]
"""Told per unit: its number in the list, its bytes as they travel, and their XXH3-128."""

TellWritten: TypeAlias = Callable[[Sequence[bytes] | None], None]
"""Told once: the XXH3-128 of what was written, per unit; None if something was not written."""


class BlockMemory(Protocol):
    """See the module's docstring."""

    @property
    def layout(self) -> KVLayout: ...

    @property
    def in_place(self) -> bool:
        """The host writes the blocks themselves: it had best digest while it copies."""
        ...

    def read(
        self,
        units: Sequence[HeldUnit],
        dtype: str,
        tell: TellRead,
        *,
        seed: int | None = None,
        payload: bool = True,
    ) -> None:
        """The units as they travel in type `dtype`; `tell` is called for each, now or later.

        The blocks must keep their content until then, and a payload stays as it is as long as it is
        held and they do. Without `payload` none need be told, without `seed` no digest is.
        """
        ...

    def room(self, block_id: int, part: slice | None, num_bytes: int) -> memoryview:
        """Where the bytes of `part` of a block may be put, before they are written.

        None: they lie in no one part of it as they travel.
        """
        ...

    def write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, *, seed: int
    ) -> None:
        """Put the units into their blocks, in whole; `tell` is called once, now or later."""
        ...

    def device_bytes(self, block_id: int, part: slice) -> DeviceBytes | None:
        """A part of a block as it lies, if other processes may read it on the device."""
        ...

    def begin_io(self, handle: BlockHandle) -> bool:
        """Keep the block's memory from being reused; False if it was reused already."""
        ...

    def end_io(self, handle: BlockHandle) -> None:
        """One transfer less touches the block."""
        ...


class _HostBlocks(Protocol):
    """What `InPlace` is mixed into."""

    @property
    def layout(self) -> KVLayout: ...

    def block_bytes(self, block_id: int) -> memoryview: ...


class InPlace:
    """For blocks that the host reads and writes as they lie: nothing takes its time."""

    in_place = True

    def block_bytes(self, block_id: int) -> memoryview:
        """The block's memory, flat and writable, without a copy."""
        raise NotImplementedError

    def read(
        self: _HostBlocks,
        units: Sequence[HeldUnit],
        dtype: str,
        tell: TellRead,
        *,
        seed: int | None = None,
        payload: bool = True,
    ) -> None:
        """See BlockMemory. Told one by one: the first leaves while the next one is digested."""
        for number, (unit, blocks) in enumerate(units):
            part = layers_of(unit, self.layout)
            layers = [self.block_bytes(block_id)[part] for block_id in blocks]
            data = gather(unit, layers, self.layout, dtype)
            tell(number, data, b"" if seed is None else content_of(data, seed))

    def room(self: _HostBlocks, block_id: int, part: slice | None, num_bytes: int) -> memoryview:
        """See BlockMemory."""
        if part is None:
            return memoryview(bytearray(num_bytes))
        return self.block_bytes(block_id)[part]

    def write(
        self: _HostBlocks,
        units: Sequence[ArrivedUnit],
        dtype: str,
        tell: TellWritten,
        *,
        seed: int,
    ) -> None:
        """See BlockMemory; what lies in one piece is there already."""
        contents = []
        for unit, block_id, data, content in units:
            assert isinstance(data, memoryview), "the host cannot read a device's memory"
            if place_of(unit, self.layout, dtype) is None:
                scatter(unit, data, self.block_bytes(block_id), self.layout, dtype)
            contents.append(content or content_of(data, seed))
        tell(contents)

    def device_bytes(self, block_id: int, part: slice) -> DeviceBytes | None:
        """See BlockMemory."""
        return None
