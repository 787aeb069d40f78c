"""A step's numbers as one int32 buffer: one copy to the device, then views.

    token_ids | positions | blocks | offsets | needed rows | first_row | context_len | table_start |
    tables, one after the other

Every part starts at a multiple of 16 bytes: Triton compiles a kernel anew for other alignments. A
graph reads the buffer that it was captured with, so a padded step has the parts' sizes of its rung:

    padding row      token 0 at position 0, written to the scratch block
    padding request  one padding row, a context of 0: it reads nothing

A token that the step before samples is known on the device first: in its place stands -1 - r, where
r is its row there (`with_sampled`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.flat_batch import FlatBatch
from kernels.device_rows import DeviceRows
from kernels.paged_attention import RequestRows

Numbers = NDArray[np.int32]
ALIGN = 4  # numbers: 16 bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many numbers each part has."""

    rows: int
    requests: int
    needed: int
    tables: int

    @property
    def parts(self) -> tuple[int, ...]:
        rows, requests = self.rows, self.requests
        return (*(rows,) * 4, self.needed, requests + 1, requests, requests, self.tables)

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each part starts, and the buffer's length."""
        padded = [-(-part // ALIGN) * ALIGN for part in self.parts]
        return (0, *np.cumsum(padded).tolist())

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parts of a buffer; of the last one only what it has."""
        return [buffer[at : at + n] for at, n in zip(self.starts, self.parts, strict=False)]


def sizes_of(flat: FlatBatch) -> Sizes:
    """Of a step without padding."""
    return Sizes(
        len(flat.token_ids), len(flat.table_start) - 1, len(flat.needed_rows), len(flat.tables)
    )


def fill(out: Numbers, sizes: Sizes, flat: FlatBatch, scratch: int) -> int:
    """Write a step into `out`, padded to `sizes`; how many numbers of it are worth copying.

    Padding rows belong to as many padding requests, so there must be as many of both.
    """
    num_rows, num_requests = len(flat.token_ids), len(flat.table_start) - 1
    num_needed = len(flat.needed_rows)
    assert sizes.rows - num_rows == sizes.requests - num_requests, "padding is a request a row"
    ends = _row_ends(flat)
    first_row = np.concatenate((ends, np.arange(num_rows + 1, sizes.rows + 1)))
    parts = (
        _padded(flat.token_ids, sizes.rows, 0),
        _padded(flat.positions, sizes.rows, 0),
        _padded(flat.blocks, sizes.rows, scratch),
        _padded(flat.offsets, sizes.rows, 0),
        np.concatenate(
            (flat.needed_rows, np.arange(num_rows, num_rows + sizes.needed - num_needed))
        ),
        first_row,
        _padded(flat.positions[ends[1:] - 1] + 1, sizes.requests, 0),
        _padded(flat.table_start[:-1], sizes.requests, 0),
        flat.tables,
    )
    starts = sizes.starts
    for start, part in zip(starts, parts, strict=False):
        out[start : start + len(part)] = part
    return starts[len(parts) - 1] + len(flat.tables)


def _row_ends(flat: FlatBatch) -> NDArray[np.int64]:
    """0, and the end of each request's rows."""
    return np.concatenate(([0], flat.row_ends))


def _padded(numbers: NDArray[np.int64], size: int, filler: int) -> NDArray[np.int64]:
    return np.concatenate((numbers, np.full(size - len(numbers), filler)))


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a forward pass reads, on the device."""

    token_ids: Tensor  # int32 [T], as the next one
    positions: Tensor
    slots: tuple[Tensor, Tensor]  # block and offset of each row, int64 [T]
    needed_rows: Tensor  # int64 [N]
    rows: DeviceRows

    @classmethod
    def of(cls, buffer: Tensor, sizes: Sizes, *, max_rows: int, max_context: int) -> StepInputs:
        """Views of a buffer that `fill` has filled; what is int64 is a copy."""
        views = sizes.views(buffer)
        token_ids, positions, blocks, offsets, needed, first_row, context, start, tables = views
        rows = DeviceRows(first_row, context, tables, start, max_rows, max_context)
        slots = (blocks.long(), offsets.long())
        return cls(token_ids, positions, slots, needed.long(), rows)


def with_sampled(token_ids: Tensor, sampled: Tensor) -> Tensor:
    """Token ids with what the step before `sampled` in place of those that stand for its rows.

    What it could not sample (CORRUPTED) becomes token 0: the request ends with that step.
    """
    if not len(sampled):
        return token_ids  # it sampled nothing
    rows = (-1 - token_ids).clamp(min=0).long()
    return torch.where(token_ids < 0, sampled.clamp(min=0)[rows].to(token_ids.dtype), token_ids)


def put_sampled(buffer: Tensor, sizes: Sizes, sampled: Tensor) -> None:
    """The same in a buffer that `fill` has filled."""
    token_ids = buffer[: sizes.rows]
    token_ids.copy_(with_sampled(token_ids, sampled))


class HostRequests(Sequence[RequestRows]):
    """The requests of device rows as the reference reads them, asked of the device when needed.

    Padding is left out.
    """

    def __init__(self, rows: DeviceRows) -> None:
        self._rows = rows
        self._requests: list[RequestRows] | None = None

    def _read(self) -> list[RequestRows]:
        if self._requests is None:
            self._requests = list(_requests_of(self._rows))
        return self._requests

    @overload
    def __getitem__(self, index: int) -> RequestRows: ...

    @overload
    def __getitem__(self, index: slice) -> list[RequestRows]: ...

    def __getitem__(self, index: int | slice) -> RequestRows | list[RequestRows]:
        return self._read()[index]

    def __len__(self) -> int:
        return len(self._read())


def _requests_of(rows: DeviceRows) -> Iterator[RequestRows]:
    first_row, context_len, starts = (
        x.tolist() for x in (rows.first_row, rows.context_len, rows.table_start)
    )
    tables = rows.tables.long()
    num_real = sum(context > 0 for context in context_len)  # padding comes last
    for number, context in enumerate(context_len[:num_real]):
        first, end = first_row[number : number + 2]
        table_end = starts[number + 1] if number + 1 < num_real else len(tables)
        yield RequestRows(first, end - first, context, tables[starts[number] : table_end])


def host_buffer(num_numbers: int, device: torch.device) -> Tensor:
    """Memory that is copied to `device` without waiting; torch reuses it when the copy is over."""
    return torch.empty(num_numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
