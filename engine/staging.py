"""Host memory through which the blocks of a device travel, in both directions.

    device ── read ──▶ region ──▶ transport            transport ──▶ region ── write ──▶ device

Regions are cut from one buffer that the device reads and writes directly (pinned; on a prefill node
also shared with the decode nodes of the host). A region is free again when nobody holds a view of
it any more. Where none is left, a copy lies in plain memory: slower, and nobody else's to read.
What copies is `engine.unit_copies`.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.kv_store import Buffer

log = logging.getLogger(__name__)

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
    """The regions of one device's copies, for one thread; views may be let go of in any.

    Args:
        buffer: writable memory for the regions, which other processes may see; else its own.
    """

    def __init__(self, num_bytes: int, buffer: Buffer | None = None, *, pinned: bool) -> None:
        self.num_bytes = num_bytes if buffer is None else len(buffer)
        self.num_plain = 0  # copies for which no region was left
        self._memory = _memory(self.num_bytes, buffer, pinned=pinned)
        self._free = FreeRanges(self.num_bytes)
        self._returned: deque[tuple[int, int]] = deque()

    @property
    def num_free(self) -> int:
        self._take_back()
        return self._free.num_free

    def room(self, num_bytes: int) -> memoryview:
        """Memory for so many bytes, until nobody holds a view of it."""
        return view_of(self.region_or_plain(num_bytes))

    def region(self, num_bytes: int) -> Bytes | None:
        """The same as an array; None where no region of this length is left."""
        self._take_back()
        start = self._free.take(num_bytes)
        if start is None:
            return None
        region = self._memory[start : start + num_bytes]
        weakref.finalize(region, self._returned.append, (start, start + num_bytes)).atexit = False
        return region

    def region_or_plain(self, num_bytes: int) -> Bytes:
        """A region, or plain memory."""
        region = self.region(num_bytes)
        if region is None:
            self.num_plain += 1
            return np.empty(num_bytes, np.uint8)
        return region

    def _take_back(self) -> None:
        """Regions that were let go of, perhaps by another thread in the middle of anything."""
        while self._returned:
            self._free.give_back(*self._returned.popleft())


def _memory(num_bytes: int, buffer: Buffer | None, *, pinned: bool) -> Bytes:
    if buffer is None:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned).numpy()
    memory = np.frombuffer(buffer, np.uint8)
    if pinned:
        _pin(memory)
    return memory


def _pin(memory: Bytes) -> None:
    """Where the system refuses, copies are slower and as right."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if error:
        log.warning("%d MiB of staging memory stay unpinned: %d", memory.nbytes >> 20, error)
        with suppress(RuntimeError):  # the runtime tells its last error to the next launch
            torch.zeros(1, device="cuda")


def view_of(region: Any) -> memoryview:
    """numpy's types do not say that an array is a buffer."""
    return memoryview(region)
