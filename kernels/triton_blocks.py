"""Units gathered from the pool and scattered into it by Triton; see `kernels.block_copy`.

A program copies some tokens of one layer's keys or values: for each token, all heads of the part
lie side by side in the pool and in the unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_copy import Part
from kernels.triton_common import on_its_device, power_of_2

TILE = 8192  # numbers per program
WORDS = 2048  # of 8 bytes, per program


@on_its_device
def gather_units_triton(
    pool: Tensor, slots: Tensor, part: Part, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """See `kernels.block_copy.gather_units`."""
    num_units, num_tokens = slots.shape
    shape = (num_units, part.num_layers, 2, num_tokens, part.num_heads, pool.shape[5])
    units = torch.empty(shape, dtype=dtype, device=pool.device) if out is None else out
    assert units.shape == shape
    assert units.dtype is dtype
    assert units.is_contiguous()
    _launch(units, pool, slots, part, gathers=True)
    return units


@on_its_device
def scatter_units_triton(units: Tensor, pool: Tensor, slots: Tensor, part: Part) -> None:
    """See `kernels.block_copy.scatter_units`."""
    assert units.is_contiguous()
    _launch(units, pool, slots, part, gathers=False)


@on_its_device
def read_rows_triton(rows: Tensor, addresses: Tensor) -> None:
    """See `kernels.block_copy.read_rows`; the device must be able to read what is there."""
    num_rows, num_words = rows.shape
    assert rows.is_contiguous()
    _read[(num_rows, triton.cdiv(num_words, WORDS))](
        rows, addresses, num_words, WORDS=WORDS, num_warps=8, enable_fp_fusion=True
    )


@triton.jit(do_not_specialize=["num_words"])
def _read(rows, addresses, num_words, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    source = tl.load(addresses + row).to(tl.pointer_type(tl.int64))
    words = tl.load(source + word, mask=word < num_words)
    tl.store(rows + row * num_words + word, words, mask=word < num_words)


def _launch(units: Tensor, pool: Tensor, slots: Tensor, part: Part, *, gathers: bool) -> None:
    assert slots.is_contiguous()
    dim = pool.shape[5]
    assert pool.stride()[4:] == (dim, 1)
    num_units, num_tokens = slots.shape
    run = part.num_heads * dim
    tokens = max(1, min(power_of_2(num_tokens), TILE // power_of_2(run)))
    _copy[(num_units, part.num_layers * 2, triton.cdiv(num_tokens, tokens))](
        units,
        pool[:, part.layer_start :, :, :, part.head_start :],
        slots,
        num_tokens,
        *pool.stride()[:4],
        BLOCK_SIZE=pool.shape[3],
        RUN=run,
        RUN_PADDED=power_of_2(run),
        TOKENS=tokens,
        GATHERS=gathers,
        num_warps=8,
        enable_fp_fusion=True,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _copy(
    units,
    pool,
    slots,
    num_tokens,
    block_stride,
    layer_stride,
    kind_stride,
    slot_stride,
    BLOCK_SIZE: tl.constexpr,
    RUN: tl.constexpr,
    RUN_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    GATHERS: tl.constexpr,
):
    unit, plane = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, RUN_PADDED)[None, :]
    slot = tl.load(slots + unit * num_tokens + token, mask=token < num_tokens, other=-1)
    in_pool = ((slot >= 0)[:, None]) & (column < RUN)
    in_unit = (token < num_tokens)[:, None] & (column < RUN)
    place = (slot // BLOCK_SIZE).to(tl.int64) * block_stride + (slot % BLOCK_SIZE) * slot_stride
    place += (plane // 2).to(tl.int64) * layer_stride + (plane % 2) * kind_stride
    pool += place[:, None] + column
    planes = unit * tl.num_programs(1) + plane
    units += (planes * num_tokens + token)[:, None] * RUN + column
    if GATHERS:
        numbers = tl.load(pool, mask=in_pool, other=0.0)
        tl.store(units, numbers.to(units.dtype.element_ty), mask=in_unit)
    else:
        numbers = tl.load(units, mask=in_pool, other=0.0)
        tl.store(pool, numbers.to(pool.dtype.element_ty), mask=in_pool)
