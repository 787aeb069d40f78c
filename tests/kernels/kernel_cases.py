"""One call of every kernel in the shapes that are served: Llama 3 8B, a window, odd heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.block_copy import Part
from kernels.device_rows import DeviceRows
from kernels.ops import HeadNorms, LayerSlots
from kernels.triton_attention import paged_attention_triton
from kernels.triton_blocks import gather_units_triton, scatter_units_triton
from kernels.triton_digest import accumulate_triton
from kernels.triton_layers import add_norm_triton, rotary_triton, silu_mul_triton
from kernels.triton_matmul import linear_invariant_triton
from kernels.triton_sampling import (
    filter_floor_triton,
    gumbel_argmax_triton,
    penalize_triton,
)
from kernels.xxh3 import secret_words

NUM_BLOCKS, BLOCK_SIZE = 8, 16


def rows(num_requests: int, max_rows: int, max_context: int) -> DeviceRows:
    """Numbers do not matter: nothing is run."""
    return DeviceRows(
        first_row=torch.zeros(num_requests + 1, dtype=torch.int32),
        context_len=torch.ones(num_requests, dtype=torch.int32),
        tables=torch.zeros(num_requests, 4, dtype=torch.int32),
        table_start=torch.zeros(num_requests, dtype=torch.int32),
        max_rows=max_rows,
        max_context=max_context,
    )


def cache(num_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pool = torch.zeros(NUM_BLOCKS, 2, 2, BLOCK_SIZE, num_heads, dim, dtype=dtype)
    return pool[:, 1, 0], pool[:, 1, 1]


def attend(
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    *,
    max_rows: int = 1,
    max_context: int = 4096,
    num_requests: int = 4,
    extras: bool = False,
    invariant: bool = False,
) -> Callable[[], object]:
    def call() -> object:
        query = torch.zeros(num_requests * max_rows, heads[0], dim, dtype=dtype)
        keys, values = cache(heads[1], dim, dtype)
        return paged_attention_triton(
            query,
            keys,
            values,
            rows(num_requests, max_rows, max_context),
            scale=0.1,
            window=100 if extras else None,
            softcap=2.0 if extras else None,
            sinks=torch.zeros(heads[0]) if extras else None,
            invariant=invariant,
        )

    return call


def rotate(dim: int, turning: int, dtype: torch.dtype, *, norms: bool) -> Callable[[], object]:
    def call() -> object:
        qkv = torch.zeros(4, (32 + 2 * 8) * dim, dtype=dtype)
        angles = torch.zeros(4, turning, dtype=dtype)
        places = torch.zeros(4, dtype=torch.int64)
        weights = torch.ones(dim, dtype=dtype)
        rotary_triton(
            qkv,
            angles,
            angles,
            LayerSlots(*cache(8, dim, dtype), places, places),
            num_query_heads=32,
            norms=HeadNorms(weights, weights, 1e-6) if norms else None,
        )
        return None

    return call


def add_norm() -> object:
    x = torch.zeros(4, 4096, dtype=torch.bfloat16)
    return add_norm_triton(x, x, x[0], 1e-5)


def silu_mul() -> object:
    return silu_mul_triton(torch.zeros(4, 2 * 14336, dtype=torch.bfloat16))


def filter_floor() -> object:
    unlimited = torch.ones(2, dtype=torch.float64)
    limits = torch.zeros(2, dtype=torch.int64)
    return filter_floor_triton(torch.zeros(2, 128_256), limits, unlimited, unlimited)


def gumbel_argmax() -> object:
    keys = torch.zeros(2, 2, dtype=torch.int32)
    return gumbel_argmax_triton(torch.zeros(2, 128_256), torch.zeros(2), keys)


def penalize() -> object:
    ids, weights = torch.zeros(5, dtype=torch.int64), torch.ones(2)
    x = torch.zeros(2, 128_256)
    penalize_triton(x, ids, ids, ids, weights, weights, weights)
    return None


def gather_and_digest() -> object:
    pool = torch.zeros(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16)
    slots = torch.zeros(2, BLOCK_SIZE, dtype=torch.int64)
    part = Part(0, 2, 0, 8)
    units = gather_units_triton(pool, slots, part, torch.bfloat16)
    scatter_units_triton(units, pool.float(), slots, part)
    return accumulate_triton(units.flatten(1).view(torch.int64), secret_words(1))


def multiply(num_rows: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        weight = torch.zeros(4096, 4096, dtype=dtype)
        return linear_invariant_triton(weight[:num_rows], weight)

    return call


LLAMA = (32, 8)
CASES: list[Callable[[], object]] = [
    attend(LLAMA, 128, torch.bfloat16),
    attend(LLAMA, 128, torch.bfloat16, max_rows=2048, num_requests=1),
    attend(LLAMA, 128, torch.bfloat16, invariant=True),
    attend((28, 4), 64, torch.float16, extras=True, max_rows=2048),
    attend((8, 4), 256, torch.bfloat16, extras=True, max_rows=2048),
    attend((32, 32), 96, torch.float32),
    rotate(128, 128, torch.bfloat16, norms=True),
    rotate(80, 32, torch.float32, norms=False),
    add_norm,
    silu_mul,
    filter_floor,
    gumbel_argmax,
    penalize,
    gather_and_digest,
    multiply(5, torch.bfloat16),
    multiply(100, torch.bfloat16),
    multiply(100, torch.float32),
]
