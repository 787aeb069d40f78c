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

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device_rows import DeviceRows
from kernels.triton_common import (
    FLOATS,
    dots_as_float32,
    num_processors,
    on_its_device,
    on_this_device,
    power_of_2,
)

MAX_HEAD_DIM = 256
MAX_GROUP = 128  # query heads per kv head
MAX_SPLITS = 64
KEYS_PER_SPLIT = 128  # a split of fewer keys costs more than it brings
PROGRAMS_PER_PROCESSOR = 4
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut; all of it known on the host without asking the device."""

    query_rows: int  # rows of a request per program
    product_rows: int  # query_rows * group, padded
    keys: int  # per step of the walk
    num_tiles: int  # of rows, over all requests; some may turn out to be empty
    one_tile: bool  # every request has one
    num_splits: int
    num_warps: int
    num_stages: int


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
    return head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP


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
    _attend[(tiling.num_tiles, num_kv_heads, splits)](
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
        SPLITS=splits,
        ONE_TILE=tiling.one_tile,
        SEARCH=-(-rows.num_requests.bit_length() // 4) * 4,  # few kernels
        HAS_WINDOW=window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        WIDE=dots_as_float32(query.dtype),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        enable_fp_fusion=not invariant,  # else tiles with and without masks round differently
    )
    if splits > 1:
        _join[(num_rows, num_heads)](
            parts,
            sums,
            output,
            HEADS=num_heads,
            DIM=dim,
            DIM_PADDED=power_of_2(dim),
            SPLITS=splits,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output


def choose_tiling(query: Tensor, keys: Tensor, rows: DeviceRows, *, invariant: bool) -> Tiling:
    """Shapes of tiles by what a processor holds, splits by how many programs there are without.

    Few shapes, because each is compiled when it is first met.
    """
    num_rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    wide = query.dtype is torch.float32
    bulky = power_of_2(dim) * query.element_size() > 256
    most = max(power_of_2(group), 32 if bulky else 64 if invariant else 128)
    product_rows = most if invariant else _product_rows(group, rows.max_rows, most)
    query_rows = product_rows // group
    one_tile = rows.max_rows <= query_rows
    num_tiles = rows.num_requests + (0 if one_tile else num_rows // query_rows)
    num_splits = 1
    if one_tile and not invariant:
        num_splits = _num_splits(num_tiles * num_kv_heads, rows.max_context, query.device)
    return Tiling(
        query_rows=query_rows,
        product_rows=product_rows,
        keys=32 if bulky else 64,
        num_tiles=num_tiles,
        one_tile=one_tile,
        num_splits=num_splits,
        num_warps=8 if product_rows >= 128 or (bulky and wide) else 4,
        num_stages=2 if product_rows >= 64 or bulky else 3,
    )


def _product_rows(group: int, max_rows: int, most: int) -> int:
    """The first of three sizes that holds the rows: for decode, for a few rows, for chunks."""
    sizes = (max(16, power_of_2(group)), max(64, power_of_2(group)))
    return next((size for size in sizes if group * max_rows <= size <= most), max(16, most))


def _num_splits(num_programs: int, max_context: int, device: torch.device) -> int:
    """A power of 2."""
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // num_programs
    useful = -(-max_context // KEYS_PER_SPLIT)
    return max(1, power_of_2(min(wanted, useful, MAX_SPLITS) + 1) // 2)


# What changes from step to step must not ask for another kernel.
@triton.jit(
    do_not_specialize=["num_requests", "window"],
    do_not_specialize_on_alignment=["first_row", "context_len", "tables", "table_start"],
)
def _attend(
    query,
    keys,
    values,
    sinks,
    output,
    parts,  # fp32 [T, HEADS, SPLITS, DIM]
    sums,  # fp32 [T, HEADS, SPLITS, 2]: maximum and sum of exponentials, base 2
    first_row,
    context_len,
    tables,
    table_start,
    num_requests,
    scale,
    softcap,
    window,
    query_stride,
    block_stride,
    slot_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SEARCH: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, tile = _request_of(tile, first_row, num_requests, ROWS, ONE_TILE, SEARCH)
    begin, end = tl.load(first_row + request), tl.load(first_row + request + 1)
    num_keys = tl.load(context_len + request)
    row = tile * ROWS
    if row >= end - begin:
        return

    product_row = tl.arange(0, ROWS_PADDED)
    dims = tl.arange(0, DIM_PADDED)
    own_row = row + product_row // GROUP
    head = kv_head * GROUP + product_row % GROUP
    real = (product_row < ROWS * GROUP) & (own_row < end - begin)
    position = num_keys - (end - begin) + own_row
    place = (begin + own_row).to(tl.int64)
    q = tl.load(
        query + (place * query_stride + head * DIM)[:, None] + dims[None, :],
        mask=real[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if WIDE:
        q = q.to(tl.float32)

    last = num_keys - (end - begin) + tl.minimum(row + ROWS, end - begin)  # keys that a row sees
    first_position = num_keys - (end - begin) + row
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(first_position - window + 1, 0)
    first_tile, end_tile = first // KEYS, tl.cdiv(last, KEYS)
    share = tl.cdiv(end_tile - first_tile, SPLITS)
    first_tile += split * share
    end_tile = tl.minimum(end_tile, first_tile + share)

    best = tl.full([ROWS_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([ROWS_PADDED], tl.float32)
    if HAS_SINKS:  # one more score, without a value; in one split only
        if split == 0:
            best = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * LOG2_E
            total = tl.full([ROWS_PADDED], 1.0, tl.float32)
    sum_values = tl.zeros([ROWS_PADDED, DIM_PADDED], tl.float32)
    keys += kv_head * DIM
    values += kv_head * DIM
    table = tables + tl.load(table_start + request)
    masked_tile = first_tile  # from here on, some row may not see some key
    if not HAS_WINDOW:
        masked_tile = tl.minimum(tl.maximum((first_position + 1) // KEYS, first_tile), end_tile)
        best, total, sum_values = _walk(
            best,
            total,
            sum_values,
            q,
            keys,
            values,
            table,
            first_tile,
            masked_tile,
            first,
            last,
            position,
            scale,
            softcap,
            window,
            block_stride,
            slot_stride,
            BLOCK_SIZE,
            KEYS,
            DIM,
            DIM_PADDED,
            False,
            HAS_WINDOW,
            HAS_SOFTCAP,
            WIDE,
        )
    best, total, sum_values = _walk(
        best,
        total,
        sum_values,
        q,
        keys,
        values,
        table,
        masked_tile,
        end_tile,
        first,
        last,
        position,
        scale,
        softcap,
        window,
        block_stride,
        slot_stride,
        BLOCK_SIZE,
        KEYS,
        DIM,
        DIM_PADDED,
        True,
        HAS_WINDOW,
        HAS_SOFTCAP,
        WIDE,
    )

    inside = real[:, None] & (dims < DIM)[None, :]
    place = place * HEADS + head
    if SPLITS == 1:
        result = sum_values / tl.where(total > 0, total, 1.0)[:, None]
        result = result.to(output.dtype.element_ty)
        tl.store(output + (place * DIM)[:, None] + dims[None, :], result, mask=inside)
    else:
        place = place * SPLITS + split
        tl.store(parts + (place * DIM)[:, None] + dims[None, :], sum_values, mask=inside)
        tl.store(sums + place * 2, best, mask=real)
        tl.store(sums + place * 2 + 1, total, mask=real)


@triton.jit
def _walk(
    best,
    total,
    sum_values,
    q,
    keys,
    values,
    table,
    first_tile,
    end_tile,
    first,
    last,
    position,
    scale,
    softcap,
    window,
    block_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The online softmax over the tiles of keys [first_tile, end_tile)."""
    dims = tl.arange(0, DIM_PADDED)
    for number in range(first_tile, end_tile):
        key = number * KEYS + tl.arange(0, KEYS)
        if MASKED:
            there = (key >= first) & (key < last)
        else:
            there = key >= 0
        block = tl.load(table + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        slot = block * block_stride + (key % BLOCK_SIZE) * slot_stride
        k_there = there[None, :] & (dims < DIM)[:, None]
        k = tl.load(keys + slot[None, :] + dims[:, None], mask=k_there, other=0.0)
        v_there = there[:, None] & (dims < DIM)[None, :]
        v = tl.load(values + slot[:, None] + dims[None, :], mask=v_there, other=0.0)
        if WIDE:
            k = k.to(tl.float32)
        scores = tl.dot(q, k, input_precision="ieee")
        if HAS_SOFTCAP:
            scores = softcap * _tanh(scores * (scale / softcap)) * LOG2_E
        else:
            scores *= scale * LOG2_E
        if MASKED:
            seen = there[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(values.dtype.element_ty)
        if WIDE:
            weights, v = weights.to(tl.float32), v.to(tl.float32)
        sum_values = tl.dot(weights, v, sum_values * fade[:, None], input_precision="ieee")
        best = top
    return best, total, sum_values


@triton.jit
def _request_of(
    tile, first_row, num_requests, ROWS: tl.constexpr, ONE_TILE: tl.constexpr, SEARCH: tl.constexpr
):
    """(request, tile within it). Without a list of tiles: request r's start at or after
    first_row[r] // ROWS + r, which is room enough for all those before."""
    if ONE_TILE:
        return tile, 0
    low, high = 0, num_requests  # the last request that starts at or before the tile
    for _ in range(SEARCH):
        middle = (low + high) // 2
        before = tl.load(first_row + middle) // ROWS + middle <= tile
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low, tile - (tl.load(first_row + low) // ROWS + low)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _join(
    parts,
    sums,
    output,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row and head: the splits' sums, brought to one maximum."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    dims, split = tl.arange(0, DIM_PADDED), tl.arange(0, SPLITS)
    best = tl.load(sums + (place * SPLITS + split) * 2)
    total = tl.load(sums + (place * SPLITS + split) * 2 + 1)
    top = tl.max(best, 0)
    fade = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(
        parts + ((place * SPLITS + split) * DIM)[:, None] + dims[None, :],
        mask=(dims < DIM)[None, :],
        other=0.0,
    )
    whole = tl.sum(total * fade, 0)
    result = tl.sum(part * fade[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(output + place * DIM + dims, result.to(output.dtype.element_ty), mask=dims < DIM)
