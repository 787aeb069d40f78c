"""Requests over scattered blocks of a poisoned pool, for tests of attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.paged_attention import RequestRows, paged_attention_reference


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class PagedCase:
    """Queries and a pool on one device; slots that no request has are NaN."""

    query: Tensor
    keys: Tensor
    values: Tensor
    requests: list[RequestRows]

    def reference(self, **options: Any) -> Tensor:
        return paged_attention_reference(
            self.query, self.keys, self.values, self.requests, **options
        )


def make_case(
    shapes: list[tuple[int, int]],  # rows, context
    heads: tuple[int, int],  # query heads, K/V heads
    dim: int,
    *,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PagedCase:
    needed = [-(-context // block_size) for _, context in shapes]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(1))
    pool = torch.full((len(order), 3, 2, block_size, heads[1], dim), torch.nan, dtype=dtype)
    requests, first_row, used = [], 0, 0
    for (num_rows, context_len), count in zip(shapes, needed, strict=True):
        table = order[used : used + count]
        place = torch.arange(context_len)
        filled = seeded(context_len, 2, heads[1], dim, seed=used).to(dtype)
        pool[table[place // block_size], 1, :, place % block_size] = filled
        requests.append(RequestRows(first_row, num_rows, context_len, table.to(device)))
        first_row += num_rows
        used += count
    pool = pool.to(device)
    query = seeded(first_row, heads[0] + 2, dim, seed=9).to(device, dtype)[:, : heads[0]]
    return PagedCase(query, pool[:, 1, 0], pool[:, 1, 1], requests)
