"""Paged attention in Triton: decode, verification, chunked prefill and mixed batches.

A program takes one K/V head, a tile of a request's rows with all their query heads, and a range of
the context, and walks it in tiles of keys with an online softmax (Milakov and Gimelshein 2018; Dao
et al. 2022). Query heads of one K/V head stand below one another, so keys are read once for all:

    row of the product    0 ... group - 1   group ... 2 group - 1   ...  (padding to 16 or more)
    query row             0                 1
    query head            the group's heads, in order

Where few rows leave processors idle, the context is split among programs, and a second kernel
joins their parts (flash-decoding; Dao, Haziza, Massa, Sizov 2023). Tiles of keys start at
multiples of their size, whatever the rows: without splits, and with tiles of one shape, a row's
result depends on no other row, on no chunk, and on nothing else in the batch (`invariant`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_tiling import MAX_SPLITS, choose_tiling
from kernels.device_rows import DeviceRows
from kernels.triton_attend import attend
from kernels.triton_common import (
    FLOATS,
    dots_as_float32,
    on_its_device,
    on_this_device,
    power_of_2,
)
from kernels.triton_join import join

MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads per kv head
MAX_NUMBERS = 1 << 14  # of a group's queries: twice as many in fp32 are too many for an A100


def supports(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `paged_attention_triton` takes such tensors."""
    group, dim = query.shape[1] // keys.shape[2], keys.shape[3]
    return (
        query.dtype == keys.dtype == values.dtype
        and query.dtype in FLOATS
        and has_kernel(dim, group)
        and query.stride()[1:] == (dim, 1)
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (dim, 1)
        and on_this_device(query, keys, values)
    )


def has_kernel(head_dim: int, group: int) -> bool:
    """Whether there is a kernel for such heads."""
    fits = power_of_2(group) * power_of_2(head_dim) <= MAX_NUMBERS
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP and fits


@on_its_device
def paged_attention_triton(
    query: Tensor,  # [T, Hq, D]; rows may be apart
    keys: Tensor,  # [num_blocks, block_size, Hkv, D]; blocks and slots may be apart
    values: Tensor,
    rows: DeviceRows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    invariant: bool = False,
) -> Tensor:
    """Same contract as `paged_attention_reference`, for what `supports` takes.

    Args:
        invariant: one shape of tile and no splits, for the same bits in every company.
    """
    num_rows, num_heads, dim = query.shape
    output = torch.empty((num_rows, num_heads, dim), dtype=query.dtype, device=query.device)
    tiling = choose_tiling(query, keys, rows, invariant=invariant)
    num_kv_heads, splits = keys.shape[2], tiling.num_splits
    parts, sums = output, output  # not touched where nothing is split
    if splits > 1:
        parts = torch.empty((num_rows, num_heads, splits, dim), device=query.device)
        sums = torch.empty((num_rows, num_heads, splits, 2), device=query.device)
    attend[(tiling.num_tiles, num_kv_heads, splits)](
        query,
        keys,
        values,
        output if sinks is None else sinks,
        output,
        parts,
        sums,
        rows.first_row,
        rows.context_len,
        rows.tables,
        rows.table_start,
        rows.num_requests,
        rows.num_requests.bit_length(),
        scale,
        0.0 if softcap is None else softcap,
        0 if window is None else window,
        query.stride(0),
        keys.stride(0),
        keys.stride(1),
        HEADS=num_heads,
        GROUP=num_heads // num_kv_heads,
        DIM=dim,
        DIM_PADDED=power_of_2(dim),
        BLOCK_SIZE=keys.shape[1],
        ROWS=tiling.query_rows,
        ROWS_PADDED=tiling.product_rows,
        KEYS=tiling.keys,
        SPLIT=splits > 1,
        ONE_TILE=tiling.one_tile,
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        WIDE=dots_as_float32(query.dtype),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=not invariant,  # else tiles with and without masks round differently
    )
    if splits > 1:
        join[(num_rows, num_heads)](
            parts,
            sums,
            output,
            splits,
            HEADS=num_heads,
            DIM=dim,
            DIM_PADDED=power_of_2(dim),
            SPLITS_PADDED=MAX_SPLITS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output
