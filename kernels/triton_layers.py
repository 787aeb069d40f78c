"""Norm, rotary with cache write, and the MLP's activation in Triton, each in one pass.

A row or head is computed in fp32 by one program, so its bits depend on nothing beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import HeadNorms, LayerSlots
from kernels.triton_common import on_its_device, power_of_2

MAX_WIDTH = 1 << 15  # of a norm: a row is held by one program
HEAD_TILE = 2048  # numbers of a row's heads per program
ACTIVATION_TILE = 1024


@on_its_device
def add_norm_triton(residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """See LayerOps.add_norm."""
    num_rows, width = residual.shape
    output = torch.empty((num_rows, width), dtype=residual.dtype, device=residual.device)
    added = residual if branch is None else branch
    padded = power_of_2(width)
    _add_norm[(num_rows,)](
        residual,
        added,
        weight,
        output,
        residual.stride(0),
        added.stride(0),
        eps,
        WIDTH=width,
        PADDED=padded,
        ADDS=branch is not None,
        num_warps=min(16, max(1, padded // 512)),
        enable_fp_fusion=True,
    )
    return output


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """See LayerOps.silu_mul."""
    return _gated(gate_up, gelu=False)


def gelu_mul_triton(gate_up: Tensor) -> Tensor:
    """See LayerOps.gelu_mul."""
    return _gated(gate_up, gelu=True)


@on_its_device
def _gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _activation_mul[(num_rows, triton.cdiv(width, ACTIVATION_TILE))](
        gate_up,
        output,
        gate_up.stride(0),
        WIDTH=width,
        TILE=ACTIVATION_TILE,
        GELU=gelu,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return output


@on_its_device
def rotary_triton(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: LayerSlots,
    *,
    num_query_heads: int,
    norms: HeadNorms | None = None,
) -> None:
    """See LayerOps.rotary."""
    assert slots.blocks.is_contiguous()
    assert slots.offsets.is_contiguous()
    assert slots.keys.stride() == slots.values.stride()
    num_kv_heads, dim = slots.keys.shape[2:]
    turning = cos.shape[-1]
    num_heads = num_query_heads + 2 * num_kv_heads
    rest = dim - turning
    half_padded, rest_padded = power_of_2(turning // 2), power_of_2(max(1, rest))
    heads = min(power_of_2(num_heads), HEAD_TILE // power_of_2(2 * half_padded + rest_padded))
    _rotary[(len(qkv), triton.cdiv(num_heads, heads))](
        qkv,
        cos,
        sin,
        cos if norms is None else norms.query,
        cos if norms is None else norms.key,
        slots.keys,
        slots.values,
        slots.blocks,
        slots.offsets,
        0.0 if norms is None else norms.eps,
        qkv.stride(0),
        cos.stride(0),
        slots.keys.stride(0),
        slots.keys.stride(1),
        QUERY_HEADS=num_query_heads,
        KV_HEADS=num_kv_heads,
        DIM=dim,
        HALF=turning // 2,
        HALF_PADDED=half_padded,
        REST=rest,
        REST_PADDED=rest_padded,
        HEADS=heads,
        HAS_NORMS=norms is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _add_norm(
    residual,
    branch,
    weight,
    output,
    residual_stride,
    branch_stride,
    eps,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ADDS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    place = residual + row * residual_stride + column
    x = tl.load(place, mask=inside, other=0.0)
    if ADDS:
        added = tl.load(branch + row * branch_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(x.dtype)
        tl.store(place, x, mask=inside)
    wide = x.to(tl.float32)
    normal = (wide * _inverse_rms(wide, eps, WIDTH, 0)).to(x.dtype)
    scaled = normal.to(tl.float32) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + column, scaled.to(x.dtype), mask=inside)


@triton.jit
def _inverse_rms(x, eps, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(x * x, AXIS) / WIDTH + eps)


@triton.jit
def _activation_mul(
    gate_up, output, stride, WIDTH: tl.constexpr, TILE: tl.constexpr, GELU: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + WIDTH + column, mask=inside, other=0.0)
    logit = gate
    if GELU:  # x (1 + tanh(y)) / 2 is x times the logistic function of 2 y
        logit = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 sqrt(2 / pi)
    logistic = 1.0 + tl.exp(-tl.maximum(logit, -80.0))  # beyond, nothing is left of the number
    active = (gate / logistic).to(up.dtype).to(tl.float32)
    result = active * up.to(tl.float32)
    tl.store(output + row * WIDTH + column, result.to(up.dtype), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["blocks", "offsets"])  # parts of a buffer
def _rotary(
    qkv,
    cos,
    sin,
    query_norm,
    key_norm,
    keys,
    values,
    blocks,
    offsets,
    eps,
    row_stride,
    turn_stride,
    block_stride,
    slot_stride,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Some heads of one row: what turns in two halves, and the dims that do not."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    is_query, is_value = head < QUERY_HEADS, head >= QUERY_HEADS + KV_HEADS
    here = head < QUERY_HEADS + 2 * KV_HEADS
    half, rest = tl.arange(0, HALF_PADDED)[None, :], tl.arange(0, REST_PADDED)[None, :]
    in_half, in_rest = here & (half < HALF), here & (rest < REST)
    source = qkv + row * row_stride + head * DIM
    low = tl.load(source + half, mask=in_half, other=0.0)
    high = tl.load(source + HALF + half, mask=in_half, other=0.0)
    still = tl.load(source + 2 * HALF + rest, mask=in_rest, other=0.0)
    tl.debug_barrier()  # queries are written where other threads may still have to read

    x, y, z = low.to(tl.float32), high.to(tl.float32), still.to(tl.float32)
    if HAS_NORMS:
        squares = tl.sum(x * x, 1) + tl.sum(y * y, 1) + tl.sum(z * z, 1)
        factor = 1.0 / tl.sqrt(squares / DIM + eps)[:, None]
        x = _normed(x, factor, query_norm, key_norm, is_query, is_value, half, HALF, low.dtype)
        y = _normed(
            y, factor, query_norm + HALF, key_norm + HALF, is_query, is_value, half, HALF, low.dtype
        )
        z = _normed(
            z,
            factor,
            query_norm + 2 * HALF,
            key_norm + 2 * HALF,
            is_query,
            is_value,
            rest,
            REST,
            low.dtype,
        )
    angle = row * turn_stride + half
    cos_low = tl.load(cos + angle, mask=half < HALF, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angle, mask=half < HALF, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angle + HALF, mask=half < HALF, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angle + HALF, mask=half < HALF, other=0.0).to(tl.float32)
    low = tl.where(is_value, x, x * cos_low - y * sin_low).to(low.dtype)
    high = tl.where(is_value, y, y * cos_high + x * sin_high).to(low.dtype)
    still = z.to(low.dtype)

    block = tl.load(blocks + row).to(tl.int64)
    slot = block * block_stride + tl.load(offsets + row) * slot_stride
    keys += slot + (head - QUERY_HEADS) * DIM
    values += slot + (head - QUERY_HEADS - KV_HEADS) * DIM
    is_key = (head >= QUERY_HEADS) & (head < QUERY_HEADS + KV_HEADS)
    _store_head(source, low, high, still, half, rest, is_query & in_half, is_query & in_rest, HALF)
    _store_head(keys, low, high, still, half, rest, is_key & in_half, is_key & in_rest, HALF)
    _store_head(values, low, high, still, half, rest, is_value & in_half, is_value & in_rest, HALF)


@triton.jit
def _normed(
    x,
    factor,
    query_norm,
    key_norm,
    is_query,
    is_value,
    dims,
    NUM_DIMS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Values stay; the rest is multiplied and rounded as the reference does it."""
    for_query = tl.load(query_norm + dims, mask=dims < NUM_DIMS, other=0.0).to(tl.float32)
    for_key = tl.load(key_norm + dims, mask=dims < NUM_DIMS, other=0.0).to(tl.float32)
    scaled = (x * factor).to(dtype).to(tl.float32) * tl.where(is_query, for_query, for_key)
    return tl.where(is_value, x, scaled.to(dtype).to(tl.float32))


@triton.jit
def _store_head(place, low, high, still, half, rest, in_half, in_rest, HALF: tl.constexpr):
    tl.store(place + half, low, mask=in_half)
    tl.store(place + HALF + half, high, mask=in_half)
    tl.store(place + 2 * HALF + rest, still, mask=in_rest)
