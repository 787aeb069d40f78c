"""Host memory through which the blocks of a device travel, in both directions.

    device ── read ──▶ region ──▶ transport            transport ──▶ region ── write ──▶ device

Regions are cut from one buffer that the device reads and writes directly (pinned; on a prefill node
also shared with the decode nodes of the host). A region is free again when nobody holds a view of
it any more. Where none is left, a copy lies in plain memory: slower, and nobody else's to read.

Copies run on a stream of their own, so they wait for no step, and whoever asks for one waits for it
alone. What is read must have been computed, and what is written be of no running step: the layers'
events (`engine.runner.WhenDone`) and the blocks' owners see to that.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_store import Buffer, KVStore

DEFAULT_BYTES = 256 << 20
MIN_BLOCKS = 16

Bytes = NDArray[np.uint8]


def staging_bytes(block_bytes: int) -> int:
    """A buffer for blocks of this size."""
    return max(DEFAULT_BYTES, MIN_BLOCKS * block_bytes)


class FreeRanges:
    """Which parts [start, end) of a buffer are free; first fit, neighbours joined."""

    def __init__(self, size: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size)]  # in order, never touching

    @property
    def num_free(self) -> int:
        return sum(end - start for start, end in self._free)

    def take(self, size: int) -> int | None:
        """Where `size` bytes start; None if there is no such range in one piece."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= size:
                self._free[index : index + 1] = [(start + size, end)] if end - start > size else []
                return start
        return None

    def give_back(self, start: int, end: int) -> None:
        """A range that was taken is free again."""
        index = sum(1 for first, _ in self._free if first < start)
        before, after = self._free[:index], self._free[index:]
        if before and before[-1][1] == start:
            start = before.pop()[0]
        if after and after[0][0] == end:
            end = after.pop(0)[1]
        self._free = [*before, (start, end), *after]


class Staging:
    """The regions of one store, for one thread; views may be let go of in any.

    Args:
        buffer: writable memory for the regions, which other processes may see; else its own.
    """

    def __init__(self, store: KVStore, num_bytes: int = 0, buffer: Buffer | None = None) -> None:
        device = store.blocks.device
        num_bytes = num_bytes or staging_bytes(store.layout.block_bytes)
        self.num_bytes = num_bytes if buffer is None else len(buffer)
        self._store = store
        self._memory = _memory(self.num_bytes, buffer, pinned=device.type == "cuda")
        self._free = FreeRanges(self.num_bytes)
        self._returned: deque[tuple[int, int]] = deque()
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def num_free(self) -> int:
        self._take_back()
        return self._free.num_free

    def room(self, num_bytes: int) -> memoryview:
        """Memory for so many bytes, until nobody holds a view of it."""
        return _view(self._region(num_bytes))

    def read(self, block_id: int, part: slice) -> memoryview:
        """A copy of a part of a block."""
        source = self._store.block_as_bytes(block_id)[part]
        region = self._region(len(source))
        with self._copying():
            torch.from_numpy(region).copy_(source, non_blocking=True)
        return _view(region)

    def write(self, block_id: int, part: slice, data: memoryview) -> None:
        """Put `data` into a part of a block."""
        target = self._store.block_as_bytes(block_id)[part]
        with self._copying():
            target.copy_(_tensor(data), non_blocking=True)

    def _region(self, num_bytes: int) -> Bytes:
        self._take_back()
        start = self._free.take(num_bytes)
        if start is None:
            return np.empty(num_bytes, np.uint8)
        region = self._memory[start : start + num_bytes]
        weakref.finalize(region, self._returned.append, (start, start + num_bytes)).atexit = False
        return region

    def _take_back(self) -> None:
        """Regions that were let go of, perhaps by another thread in the middle of anything."""
        while self._returned:
            self._free.give_back(*self._returned.popleft())

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies in it run on the stream, and are over when it ends."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def _memory(num_bytes: int, buffer: Buffer | None, *, pinned: bool) -> Bytes:
    if buffer is None:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).numpy()
    memory = np.frombuffer(buffer, np.uint8)
    if pinned:  # where the system refuses, copies are slower and as right
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        cudart.cudaHostRegister(memory.ctypes.data, num_bytes, 0)
    return memory


def _view(region: Any) -> memoryview:  # numpy's types do not say that it is a buffer
    return memoryview(region)


def _tensor(data: memoryview) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8))
