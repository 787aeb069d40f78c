"""Many units at once between a device's blocks and the host, on a stream of their own.

    blocks ─ gather ─▶ scratch ─┬▶ digests           host's bytes ─┬▶ scratch ─┬▶ digests
                                └▶ pinned region    peer's memory ─┘           └ scatter ▶ blocks

Units of one shape are one launch, one copy and one event. Nothing here waits: who asks is told when
an event says that the device has done it (`WhenOver`). The digest is of the scratch's copy: what
travels, and what is put into the blocks, so that the copies to and from the device are covered too,
and the host need not read what it only passes on.

What is read must have been computed, and what is written be of no running step: the layers' events
(`engine.runner.WhenDone`) and the blocks' owners see to that.

Scratch is made once, at the start, and used in the stream's order: no copy can fail for want of
device memory in the middle of a day, and none waits for another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv_store import KVStore
from engine.staging import Staging, view_of
from kernels.block_copy import Part
from kernels.unit_kernels import REFERENCE, UnitKernels, kernels_for
from kernels.xxh3 import MIN_BYTES, finish, secret_words

SCRATCH_BYTES = 64 << 20
WITHOUT_TRITON: UnitKernels = REFERENCE


def scratch_size(block_bytes: int, wanted: int = SCRATCH_BYTES) -> int:
    """Room for at least a block of any type."""
    return max(wanted, 4 * block_bytes)


WhenOver: TypeAlias = Callable[[Callable[[], None]], None]
"""Calls what it is given once all is done that was launched on the current stream."""


def at_once(tell: Callable[[], None]) -> None:
    """For a CPU, where a copy is over when its call is."""
    tell()


@dataclass(frozen=True, slots=True)
class Cut:
    """Units of one shape: which slots, layers and heads of the pool, and the type on the way."""

    part: Part
    slots: NDArray[np.int64]  # [U, tokens]; see kernels.block_copy
    dtype: torch.dtype

    @staticmethod
    def of(
        layers: tuple[int, int],
        heads: tuple[int, int],
        slots: NDArray[np.int64],
        dtype: torch.dtype,
    ) -> Cut:
        """Of half-open ranges of layers and of the pool's own heads."""
        return Cut(Part(*layers, *heads), slots, dtype)

    def __len__(self) -> int:
        return len(self.slots)

    def shape(self, head_dim: int) -> tuple[int, ...]:
        """[U, layers, 2, tokens, heads, dim]"""
        part = self.part
        return (*(len(self), part.num_layers, 2), self.slots.shape[1], part.num_heads, head_dim)

    def rows(self, rows: slice) -> Cut:
        return Cut(self.part, self.slots[rows], self.dtype)


@dataclass(frozen=True, slots=True)
class Address:
    """Memory of this device that is no tensor's."""

    address: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Copied:
    """One unit: its bytes on the host and their XXH3-128, each where it was asked for."""

    payload: memoryview | None
    content: bytes | None


class UnitCopies:
    """The copies of one store, for one thread.

    Args:
        kernels: None: those of Triton on a GPU, else the references. References move units on a GPU
            too, slower; only they cannot read an `Address` there.
    """

    def __init__(
        self,
        store: KVStore,
        staging: Staging,
        *,
        when_over: WhenOver = at_once,
        scratch_bytes: int = SCRATCH_BYTES,
        kernels: UnitKernels | None = None,
    ) -> None:
        self._store = store
        self._staging = staging
        self._device = store.blocks.device
        self._head_dim = store.layout.head_dim
        self._when_over = when_over
        self._kernels = kernels or kernels_for(self._device)
        size = scratch_size(store.layout.block_bytes, scratch_bytes)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._stream: Any = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def unit_bytes(self, cut: Cut) -> int:
        """Of each unit of the cut, as it travels."""
        return int(np.prod(cut.shape(self._head_dim)[1:])) * cut.dtype.itemsize

    def read(
        self,
        cut: Cut,
        tell: Callable[[int, list[Copied]], None],
        *,
        seed: int | None,
        payload: bool,
    ) -> None:
        """Gather the units; `tell` hears of some of them at a time, from the first one's number on.

        Args:
            seed: of their digests; None: none are wanted.
            payload: their bytes are.
        """
        for start, piece in self._pieces(cut):
            with self._on_stream():
                units = self._units(piece)
                slots = self._to_device(piece.slots)
                self._kernels.gather_units(
                    self._store.blocks, slots, piece.part, piece.dtype, units
                )
                digests = self._digests(units, seed)
                payloads = self._to_host(units) if payload else [None] * len(piece)
                self._when_over(partial(self._tell_read, partial(tell, start), payloads, digests))

    def write(
        self,
        cut: Cut,
        sources: Sequence[memoryview | Address],
        tell: Callable[[int, list[bytes | None]], None],
        *,
        seed: int | None,
    ) -> None:
        """Scatter the units, whose bytes are at `sources`; `tell` hears their digests.

        The sources must stay as they are until then.
        """
        for start, piece in self._pieces(cut):
            rows = sources[start : start + len(piece)]
            with self._on_stream():
                units = self._units(piece)
                self._fill(units, rows)
                digests = self._digests(units, seed)
                slots = self._to_device(piece.slots)
                self._kernels.scatter_units(units, self._store.blocks, slots, piece.part)
                self._when_over(partial(self._tell_written, partial(tell, start), rows, digests))

    def warm_up(self, block_id: int) -> None:
        """Have the kernels compiled for units of each length, on a block that is nobody's."""
        layout, blocks = self._store.layout, self._store.blocks
        part = Part(0, layout.num_layers, 0, layout.num_kv_heads)
        num_tokens = layout.block_size
        while num_tokens:
            slots = block_id * layout.block_size + np.arange(num_tokens)
            cut = Cut(part, slots[None], blocks.dtype)
            with self._on_stream():
                there = self._to_device(cut.slots)
                units = self._units(cut)
                self._kernels.gather_units(blocks, there, part, cut.dtype, units)
                self._digests(units, 0 if can_digest(self.unit_bytes(cut)) else None)
                self._kernels.scatter_units(units, blocks, there, part)
            num_tokens //= 2
        self.wait()

    def wait(self) -> None:
        """Until nothing is under way; for when something has failed."""
        if self._stream is not None:
            with suppress(RuntimeError):  # the device is lost, and whoever waits for it says so
                self._stream.synchronize()

    # ------------------------------------------------------------ inside

    def _pieces(self, cut: Cut) -> Iterator[tuple[int, Cut]]:
        """As many units at a time as the scratch holds."""
        count = max(1, len(self._scratch) // self.unit_bytes(cut))
        for start in range(0, len(cut), count):
            yield start, cut.rows(slice(start, start + count))

    def _units(self, piece: Cut) -> Tensor:
        """The scratch as the units of a piece."""
        size = len(piece) * self.unit_bytes(piece)
        return self._scratch[:size].view(piece.dtype).view(piece.shape(self._head_dim))

    def _to_device(self, numbers: NDArray[np.int64]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(numbers))
        return (
            tensor
            if self._stream is None
            else tensor.pin_memory().to(self._device, non_blocking=True)
        )

    def _digests(self, units: Tensor, seed: int | None) -> _Digests | None:
        if seed is None:
            return None
        words = units.view(torch.uint8).view(len(units), -1).view(torch.int64)
        secret = secret_words(seed)
        if self._stream is not None:
            secret = secret.pin_memory().to(self._device, non_blocking=True)
        found = self._kernels.accumulate(words, secret)
        on_host = torch.empty(found.shape, dtype=found.dtype, pin_memory=self._stream is not None)
        on_host.copy_(found, non_blocking=True)
        return _Digests(on_host, 8 * words.shape[1], seed)

    def _to_host(self, units: Tensor) -> list[memoryview | None]:
        """One copy for all of them, where one region is left for all of them."""
        data = units.view(torch.uint8).view(len(units), -1)
        size = data.shape[1]
        whole = self._staging.region(data.numel())
        if whole is not None:
            torch.from_numpy(whole).copy_(data.flatten(), non_blocking=True)
            view = view_of(whole)
            return [view[row * size : (row + 1) * size] for row in range(len(data))]
        regions = [self._staging.region_or_plain(size) for _ in range(len(data))]
        for region, row in zip(regions, data, strict=True):
            torch.from_numpy(region).copy_(row, non_blocking=True)
        return [view_of(region) for region in regions]

    def _fill(self, units: Tensor, sources: Sequence[memoryview | Address]) -> None:
        rows = units.view(torch.uint8).view(len(units), -1)
        if all(isinstance(source, Address) for source in sources):
            addresses = np.array([s.address for s in sources if isinstance(s, Address)], np.int64)
            self._kernels.read_rows(rows.view(torch.int64), self._to_device(addresses))
            return
        for row, source in zip(rows, sources, strict=True):
            assert not isinstance(source, Address), "some are here and some there"
            row.copy_(torch.from_numpy(np.frombuffer(source, np.uint8)), non_blocking=True)

    @staticmethod
    def _tell_read(
        tell: Callable[[list[Copied]], None],
        payloads: Sequence[memoryview | None],
        digests: _Digests | None,
    ) -> None:
        contents = digests.finished() if digests else [None] * len(payloads)
        tell([Copied(*both) for both in zip(payloads, contents, strict=True)])

    @staticmethod
    def _tell_written(
        tell: Callable[[list[bytes | None]], None],
        sources: Sequence[object],
        digests: _Digests | None,
    ) -> None:
        """The sources were held until here."""
        tell([*digests.finished()] if digests else [None] * len(sources))

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            yield


@dataclass(frozen=True, slots=True)
class _Digests:
    """What the device has of some units' digests, once it has done it."""

    accumulators: Tensor
    num_bytes: int
    seed: int

    def finished(self) -> list[bytes]:
        return finish(self.accumulators, self.num_bytes, self.seed)


def can_digest(num_bytes: int) -> bool:
    """Whether the device's kernel takes inputs of this length."""
    return num_bytes >= MIN_BYTES and num_bytes % 8 == 0
