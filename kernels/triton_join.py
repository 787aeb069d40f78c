"""Joins the parts of a context that was split: the second kernel of flash-decoding."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_splits"])
def join(
    parts,  # fp32 [T, HEADS, num_splits, DIM]
    sums,  # fp32 [T, HEADS, num_splits, 2]
    output,
    num_splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """One row and head: the splits' sums, brought to one maximum."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    dims, split = tl.arange(0, DIM_PADDED), tl.arange(0, SPLITS_PADDED)
    there, part = split < num_splits, place * num_splits + split
    best = tl.load(sums + part * 2, mask=there, other=float("-inf"))
    total = tl.load(sums + part * 2 + 1, mask=there, other=0.0)
    top = tl.max(best, 0)
    fade = tl.exp2(best - tl.where(top == float("-inf"), 0.0, top))
    values = tl.load(
        parts + (part * DIM)[:, None] + dims[None, :],
        mask=there[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    whole = tl.sum(total * fade, 0)
    result = tl.sum(values * fade[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(output + place * DIM + dims, result.to(output.dtype.element_ty), mask=dims < DIM)
