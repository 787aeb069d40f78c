"""The attention kernel itself: one K/V head, a tile of a request's rows, a range of its context.

See `kernels.triton_attention` for the picture, and for who launches it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


# What changes from step to step must not ask for another kernel.
@triton.jit(
    do_not_specialize=["num_requests", "search", "window"],
    do_not_specialize_on_alignment=["first_row", "context_len", "tables", "table_start"],
)
def attend(
    query,
    keys,
    values,
    sinks,
    output,
    parts,  # fp32 [T, HEADS, splits, DIM]
    sums,  # fp32 [T, HEADS, splits, 2]: maximum and sum of exponentials, base 2
    first_row,
    context_len,
    tables,
    table_start,
    num_requests,
    search,  # halvings that find one among so many requests
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
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_splits = tl.num_programs(2)
    request, tile = _request_of(tile, first_row, num_requests, search, ROWS, ONE_TILE)
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
    if SPLIT:
        share = tl.cdiv(end_tile - first_tile, num_splits)
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
    if not SPLIT:
        result = sum_values / tl.where(total > 0, total, 1.0)[:, None]
        result = result.to(output.dtype.element_ty)
        tl.store(output + (place * DIM)[:, None] + dims[None, :], result, mask=inside)
    else:
        place = place * num_splits + split
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
def _request_of(tile, first_row, num_requests, search, ROWS: tl.constexpr, ONE_TILE: tl.constexpr):
    """(request, tile within it). Without a list of tiles: request r's start at or after
    first_row[r] // ROWS + r, which is room enough for all those before."""
    if ONE_TILE:
        return tile, 0
    low, high = 0, num_requests  # the last request that starts at or before the tile
    for _ in range(search):
        middle = (low + high) // 2
        before = tl.load(first_row + middle) // ROWS + middle <= tile
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low, tile - (tl.load(first_row + low) // ROWS + low)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
