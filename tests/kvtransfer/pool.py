"""A block pool in plain memory that notices every misuse: what a transfer may touch, and when."""

from __future__ import annotations

from collections import Counter

import numpy as np

from kvtransfer.block_memory import InPlace
from kvtransfer.units import Unit
from wire.layout import KVLayout
from wire.types import BlockHandle


def filled(block: memoryview, num_tokens: int, layout: KVLayout) -> bytes:
    """The first `num_tokens` slots of a block, in all layers."""
    slots = np.frombuffer(block, np.uint8).reshape(layout.num_layers * 2, layout.block_size, -1)
    return slots[:, :num_tokens].tobytes()


def unit_of(block: int, token_start: int | None = None, token_end: int | None = None) -> Unit:
    """A unit of a whole block of four tokens, of a model with one layer and one head."""
    start = 4 * block if token_start is None else token_start
    end = start + 4 if token_end is None else token_end
    return Unit(block, block, start, end, 0, 1, 0, 1)


class Pool(InPlace):
    """Implements BlockMemory. A freed block stays quarantined while a transfer touches it."""

    def __init__(self, layout: KVLayout, num_blocks: int = 64, epoch: int = 1) -> None:
        self.layout = layout
        self.epoch = epoch
        self.blocks = [bytearray(layout.block_bytes) for _ in range(num_blocks)]
        self.generations = [0] * num_blocks
        self.free_ids = list(range(num_blocks))
        self.quarantined: set[int] = set()
        self.io: Counter[int] = Counter()

    # ------------------------------------------------------------ BlockMemory

    def block_bytes(self, block_id: int) -> memoryview:
        return memoryview(self.blocks[block_id])

    def begin_io(self, handle: BlockHandle) -> bool:
        if not self.is_current(handle):
            return False
        self.io[handle.block_id] += 1
        return True

    def end_io(self, handle: BlockHandle) -> None:
        assert self.io[handle.block_id] > 0, f"{handle} was let go of twice"
        self.io[handle.block_id] -= 1
        if not self.io[handle.block_id] and handle.block_id in self.quarantined:
            self.quarantined.remove(handle.block_id)
            self.free_ids.append(handle.block_id)

    # ------------------------------------------------------------ for the tests

    def allocate(self, count: int) -> tuple[BlockHandle, ...]:
        ids = [self.free_ids.pop(0) for _ in range(count)]
        for block_id in ids:
            self.generations[block_id] += 1
        return tuple(BlockHandle(self.epoch, i, self.generations[i]) for i in ids)

    def filled(self, count: int, seed: int) -> tuple[BlockHandle, ...]:
        """Blocks full of noise."""
        handles = self.allocate(count)
        noise = np.random.default_rng(seed)
        for handle in handles:
            self.block_bytes(handle.block_id)[:] = noise.bytes(self.layout.block_bytes)
        return handles

    def release(self, handles: tuple[BlockHandle, ...]) -> None:
        for handle in handles:
            assert self.is_current(handle), f"{handle} was freed before"
            self.generations[handle.block_id] += 1
            if self.io[handle.block_id]:
                self.quarantined.add(handle.block_id)
            else:
                self.free_ids.append(handle.block_id)

    def is_current(self, handle: BlockHandle) -> bool:
        return handle.epoch == self.epoch and self.generations[handle.block_id] == handle.generation

    def content(self, handle: BlockHandle, num_tokens: int) -> bytes:
        """The first `num_tokens` slots of a block."""
        return filled(self.block_bytes(handle.block_id), num_tokens, self.layout)

    @property
    def touched(self) -> int:
        """Transfers that touch some block right now."""
        return self.io.total()
