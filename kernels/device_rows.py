"""A step's requests as a device reads them: flat int32 tensors, of which the host asks nothing.

    rows          a a a a b c c . .      first_row  0 4 5 7 7     one more than requests
    requests      4 of a, 1 of b, 2 of c, and one that is padding: it has no rows

A captured graph reads the same tensors at every replay, so whoever replays it copies the step's
numbers into them. Only the bounds are the host's: they size grids and choose kernels, and must hold
for every replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged_attention import RequestRows


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Requests whose rows follow one another, in the batch's order.

    Rows from `first_row[-1]` on belong to nobody: what attention gives for them means nothing. So
    does a request with rows and a `context_len` of 0, which a graph may use as padding.
    """

    first_row: Tensor  # int32 [R + 1]; request r has the rows [first_row[r], first_row[r + 1])
    context_len: Tensor  # int32 [R], this step's tokens included
    tables: Tensor  # int32, flat or [R, blocks]: block ids
    table_start: Tensor  # int32 [R]: where each request's table starts in the flat `tables`
    max_rows: int  # no request has more rows
    max_context: int  # no request has a longer context

    @property
    def num_requests(self) -> int:
        """Padding included."""
        return self.context_len.shape[0]

    @staticmethod
    def of(requests: Sequence[RequestRows]) -> DeviceRows:
        """The same on the device of the block tables; for steps that no graph replays."""
        ends = [r.first_row + r.num_rows for r in requests]
        assert [r.first_row for r in requests] == [0, *ends[:-1]], "rows out of order"
        tables = torch.cat([r.block_table for r in requests]).to(torch.int32)
        starts = [0]
        for request in requests[:-1]:
            starts.append(starts[-1] + len(request.block_table))
        numbers = [[0, *ends], [r.context_len for r in requests], starts]
        first_row, context_len, table_start = _to_device(numbers, tables.device)
        return DeviceRows(
            first_row=first_row,
            context_len=context_len,
            tables=tables,
            table_start=table_start,
            max_rows=max(r.num_rows for r in requests),
            max_context=max(r.context_len for r in requests),
        )


def _to_device(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """int32 tensors of the lists, in one copy."""
    flat = torch.tensor([number for numbers in lists for number in numbers], dtype=torch.int32)
    parts = torch.split(flat.to(device), [len(numbers) for numbers in lists])
    return list(parts)
