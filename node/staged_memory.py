"""A device's blocks as a transfer sees them: units go through scratch on the device.

Units of one shape are gathered together, and what arrives within one turn of the event loop is
scattered together (`engine.unit_copies`). The device also computes the digests: of arriving units
too, of what it is about to put into its blocks. On the host that would be one more pass over bytes
that it only passes on, in the loop that serves everybody. What the device's kernels cannot take
(eight-bit numbers; digests of less than 256 bytes) is encoded or digested on the host.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from engine.device import first_line, is_broken
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.staging import Staging, view_of
from engine.unit_copies import Address, Copied, Cut, UnitCopies, can_digest
from kvtransfer.block_memory import (
    ArrivedUnit,
    DeviceBytes,
    HeldUnit,
    TellRead,
    TellWritten,
)
from kvtransfer.device_pool import ALIGNMENT
from kvtransfer.digest import content_of
from kvtransfer.numbers import STORES, decode, encode
from kvtransfer.units import Unit
from wire.geometry import SCALED_DTYPES
from wire.layout import KVLayout
from wire.types import BlockHandle

log = logging.getLogger(__name__)


class _Shape(NamedTuple):
    """What units that are copied together have in common."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    num_tokens: int

    @staticmethod
    def of(unit: Unit) -> _Shape:
        layers, heads = (unit.layer_start, unit.layer_end), (unit.head_start, unit.head_end)
        return _Shape(layers, heads, unit.num_tokens)


@dataclass(slots=True)
class _Write:
    """One call of `write`, until all its units are in their blocks."""

    units: Sequence[ArrivedUnit]
    dtype: str
    seed: int
    tell: TellWritten
    contents: list[bytes | None] = field(init=False)
    left: int = field(init=False)  # units

    def __post_init__(self) -> None:
        self.contents = [unit.content for unit in self.units]
        self.left = len(self.units)

    def written(self, number: int, content: bytes | None) -> None:
        if content is not None:
            self.contents[number] = content
        self.left -= 1
        if not self.left:
            self.tell([content for content in self.contents if content is not None])

    def failed(self) -> None:
        """Some of it was not written."""
        if self.left > 0:
            self.left = -1
            self.tell(None)


class StagedMemory:
    """See kvtransfer.block_memory.BlockMemory. For one event loop.

    Args:
        shared: other processes may read the blocks on the device.
    """

    in_place = False

    def __init__(
        self,
        engine: Engine,
        store: KVStore,
        staging: Staging,
        copies: UnitCopies,
        *,
        shared: bool = False,
    ) -> None:
        self.engine = engine
        self.staging = staging
        self.on_lost: Callable[[str], None] = log.error  # the device; with why
        self._store = store
        self._address = store.blocks.data_ptr() if shared else None
        self._copies = copies
        self._writes: list[_Write] = []

    @property
    def layout(self) -> KVLayout:
        return self._store.layout

    @property
    def max_sending_bytes(self) -> int:
        """Half of the regions: the other half is for what lands, and for gaps."""
        return self.staging.num_bytes // 2

    @property
    def num_unstaged(self) -> int:
        """Copies for which no staging memory was left."""
        return self.staging.num_plain

    def begin_io(self, handle: BlockHandle) -> bool:
        return self.engine.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        self.engine.end_io(handle)

    def device_bytes(self, block_id: int, part: slice) -> DeviceBytes | None:
        """See BlockMemory. The reader's device must be able to digest it, too."""
        num_bytes = part.stop - part.start
        start = block_id * self.layout.block_bytes + part.start
        if self._address is None or start % ALIGNMENT or not can_digest(num_bytes):
            return None
        return DeviceBytes(self._address + start, num_bytes)

    def room(self, block_id: int, part: slice | None, num_bytes: int) -> memoryview:
        """See BlockMemory."""
        return self.staging.room(num_bytes)

    # ------------------------------------------------------------ out of the blocks

    def read(
        self,
        units: Sequence[HeldUnit],
        dtype: str,
        tell: TellRead,
        *,
        seed: int | None = None,
        payload: bool = True,
    ) -> None:
        """See BlockMemory."""
        for numbers, cut in self._cuts([(held.unit, held.blocks) for held in units], dtype):
            told = _ReadAs(numbers, dtype, self.layout, seed, tell)
            on_device = dtype not in SCALED_DTYPES and can_digest(self._copies.unit_bytes(cut))
            self._launch(
                partial(
                    self._copies.read,
                    cut,
                    told,
                    seed=seed if on_device else None,
                    payload=payload or (seed is not None and not on_device),
                )
            )

    # ------------------------------------------------------------ into the blocks

    def write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, *, seed: int
    ) -> None:
        """See BlockMemory. What comes in this turn of the loop is written at its end."""
        if not self._writes:
            asyncio.get_running_loop().call_soon(self._write_all)
        self._writes.append(_Write(units, dtype, seed, tell))

    def _write_all(self) -> None:
        writes, self._writes = self._writes, []
        alike: defaultdict[tuple[str, int], list[_Write]] = defaultdict(list)
        for write in writes:
            alike[write.dtype, write.seed].append(write)
        for (dtype, seed), group in alike.items():
            try:
                self._write_alike(group, dtype, seed)
            except Exception:  # of one lease: the others' units go on
                log.exception("units were not written")
                self._copies.wait()  # nothing writes blocks that are given up
                for write in group:
                    write.failed()

    def _write_alike(self, writes: Sequence[_Write], dtype: str, seed: int) -> None:
        """Units of one lease."""
        places = [(write, number) for write in writes for number in range(len(write.units))]
        units = [write.units[number] for write, number in places]
        for numbers, cut in self._cuts([(u.unit, (u.block,)) for u in units], dtype):
            size = self._copies.unit_bytes(cut)
            on_device = dtype not in SCALED_DTYPES and can_digest(size)
            there = [places[number] for number in numbers]
            sources = []
            for number in numbers:
                write, place = places[number]
                sources.append(self._source(units[number].data, cut, dtype))
                if not on_device:
                    write.contents[place] = content_of(_on_host(units[number].data), seed)
            told = partial(_tell_writes, there)
            seed_there = seed if on_device else None
            self._launch(partial(self._copies.write, cut, sources, told, seed=seed_there))

    def _source(self, data: memoryview | DeviceBytes, cut: Cut, dtype: str) -> memoryview | Address:
        if isinstance(data, DeviceBytes):
            return Address(data.address, data.nbytes)
        if dtype in SCALED_DTYPES:
            shape = cut.shape(self.layout.head_dim)[1:]
            return memoryview(_flat(decode(data, shape, dtype, self.layout.dtype)))
        return data

    # ------------------------------------------------------------ both

    def _cuts(
        self, units: Sequence[tuple[Unit, tuple[int, ...]]], dtype: str
    ) -> Iterable[tuple[list[int], Cut]]:
        """Units by shape: their numbers, and what of the pool they are."""
        alike: defaultdict[_Shape, list[int]] = defaultdict(list)
        for number, (unit, _) in enumerate(units):
            alike[_Shape.of(unit)].append(number)
        stored = self.layout.dtype if dtype in SCALED_DTYPES else dtype
        first_head = self.layout.head_range[0]
        for shape, numbers in alike.items():
            heads = (shape.heads[0] - first_head, shape.heads[1] - first_head)
            slots = np.stack([self._slots(*units[number]) for number in numbers])
            yield numbers, Cut.of(shape.layers, heads, slots, getattr(torch, stored))

    def _slots(
        self, unit: Unit, blocks: Sequence[int]
    ) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Where the unit's tokens are, of which the first is in the first of `blocks`."""
        size = self.layout.block_size
        tokens = np.arange(unit.token_start, unit.token_end)
        return np.asarray(blocks)[tokens // size - unit.token_start // size] * size + tokens % size

    def _launch(self, copy: Callable[[], None]) -> None:
        try:
            copy()
        except Exception as error:
            self.failed(error)
            raise

    def failed(self, error: Exception) -> None:
        """A copy has; if the device is lost, the node has to end."""
        if is_broken(error):
            self.on_lost(f"the device is lost: {first_line(error)}")


@dataclass(frozen=True, slots=True)
class _ReadAs:
    """Tells of units that were read, in the wire's form."""

    numbers: Sequence[int]
    dtype: str
    layout: KVLayout
    seed: int | None
    tell: TellRead

    def __call__(self, start: int, copied: Sequence[Copied]) -> None:
        for number, one in zip(self.numbers[start:], copied, strict=False):
            data, content = one.payload, one.content
            if data is not None and self.dtype in SCALED_DTYPES:
                numbers = np.frombuffer(data, STORES[self.layout.dtype])
                data = encode(numbers.reshape(-1, self.layout.head_dim), self.dtype)
            if content is None and self.seed is not None:
                assert data is not None
                content = content_of(data, self.seed)
            self.tell(number, data, content or b"")


def _tell_writes(
    places: Sequence[tuple[_Write, int]], start: int, contents: Sequence[bytes | None]
) -> None:
    for (write, number), content in zip(places[start:], contents, strict=False):
        write.written(number, content)


def _on_host(data: memoryview | DeviceBytes) -> memoryview:
    assert isinstance(data, memoryview), "units that are digested on the host travel through it"
    return data


def _flat(numbers: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> memoryview:
    return view_of(np.ascontiguousarray(numbers).view(np.uint8).reshape(-1))
