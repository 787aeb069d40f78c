"""A linear whose rows have the same bits among any other rows, in Triton.

Tiles have one shape, and the sum over the inputs is cut into as many parts as the weight's shape
asks for, whatever the number of rows. Few rows: a program for each part, so that all processors
read weights, and a second kernel adds the parts. Many rows: a program adds them itself, in the same
order. Both add the same numbers, so both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import dots_as_float32, on_its_device, power_of_2

ROWS = 64
PARALLEL_ROWS = 64  # up to so many, a part of the sum is a program of its own
PROGRAMS = 256  # wanted for few rows, on every GPU: it decides the order of the sum
MIN_STEPS = 4  # of a part
MAX_PARTS = 16
SUM_TILE = 1024


@on_its_device
def linear_invariant_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` for x [..., in] and weight [out, in], with sums in fp32."""
    flat = x.flatten(0, -2)
    num_rows, (width, depth) = len(flat), weight.shape
    output = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
    if not num_rows:
        return output.view(*x.shape[:-1], width)
    wide = x.dtype is torch.float32
    columns, step = (64, 32) if wide else (128, 64)
    parts = num_parts(width, depth)
    parallel = parts > 1 and num_rows <= PARALLEL_ROWS
    partial = output
    if parallel:
        partial = torch.empty((parts, num_rows, width), device=x.device)
    tiles = triton.cdiv(num_rows, ROWS) * triton.cdiv(width, columns)
    _linear[(tiles, parts if parallel else 1)](
        flat,
        weight,
        output if bias is None else bias,
        partial,
        num_rows,
        flat.stride(0),
        weight.stride(0),
        WIDTH=width,
        DEPTH=depth,
        PARTS=parts,
        PARALLEL=parallel,
        HAS_BIAS=bias is not None,
        ROWS=ROWS,
        COLUMNS=columns,
        STEP=step,
        WIDE=dots_as_float32(x.dtype),
        num_warps=4,
        num_stages=2 if wide else 4,
        enable_fp_fusion=True,
    )
    if parallel:
        _add_parts[(num_rows, triton.cdiv(width, SUM_TILE))](
            partial,
            output if bias is None else bias,
            output,
            num_rows,
            WIDTH=width,
            PARTS=parts,
            HAS_BIAS=bias is not None,
            TILE=SUM_TILE,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return output.view(*x.shape[:-1], width)


def num_parts(width: int, depth: int) -> int:
    """Into how many parts the sum of such a weight is cut: a function of its shape alone."""
    wanted = -(-PROGRAMS // -(-width // 128))
    return max(
        1, min(power_of_2(wanted), MAX_PARTS, power_of_2(depth // (64 * MIN_STEPS) + 1) // 2)
    )


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    weight,
    bias,
    output,  # [num_rows, WIDTH], or fp32 [PARTS, num_rows, WIDTH]
    num_rows,
    row_stride,
    weight_stride,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile, part = tl.program_id(0), tl.program_id(1)
    row_tiles = tl.cdiv(num_rows, ROWS)  # neighbours share a weight's tile
    row = (tile % row_tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tile // row_tiles * COLUMNS + tl.arange(0, COLUMNS)
    x += row[:, None] * row_stride
    weight += column.to(tl.int64)[None, :] * weight_stride
    in_rows, in_columns = (row < num_rows)[:, None], (column < WIDTH)[None, :]
    share: tl.constexpr = (DEPTH + STEP * PARTS - 1) // (STEP * PARTS) * STEP
    place = row[:, None] * WIDTH + column[None, :]
    if PARALLEL:
        total = _part(
            x, weight, in_rows, in_columns, part * share, share, ROWS, COLUMNS, STEP, DEPTH, WIDE
        )
        place += part.to(tl.int64) * num_rows * WIDTH
    else:
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for number in range(PARTS):
            total += _part(
                x,
                weight,
                in_rows,
                in_columns,
                number * share,
                share,
                ROWS,
                COLUMNS,
                STEP,
                DEPTH,
                WIDE,
            )
        if HAS_BIAS:
            total += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=in_rows & in_columns)


@triton.jit
def _part(
    x,
    weight,
    in_rows,
    in_columns,
    start,
    share,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The sum over the inputs [start, start + share)."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(start, tl.minimum(start + share, DEPTH), STEP):
        depth = first + tl.arange(0, STEP)
        a = tl.load(x + depth[None, :], mask=in_rows & (depth < DEPTH)[None, :], other=0.0)
        b = tl.load(weight + depth[:, None], mask=in_columns & (depth < DEPTH)[:, None], other=0.0)
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _add_parts(
    partial,
    bias,
    output,
    num_rows,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for part in range(PARTS):
        place = partial + (part * num_rows + row) * WIDTH + column
        total += tl.load(place, mask=column < WIDTH, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + column, total.to(output.dtype.element_ty), mask=column < WIDTH)
