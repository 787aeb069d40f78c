"""Calls of every kernel as nodes make them, to be compiled; the numbers do not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

from kernels.block_copy import Part
from kernels.device_rows import DeviceRows
from kernels.ops import HeadNorms, LayerSlots
from kernels.triton_attention import paged_attention_triton
from kernels.triton_blocks import (
    gather_units_triton,
    read_rows_triton,
    scatter_units_triton,
)
from kernels.triton_digest import accumulate_triton
from kernels.triton_layers import (
    add_norm_triton,
    gelu_mul_triton,
    rotary_triton,
    silu_mul_triton,
)
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


def cache(
    num_heads: int, dim: int, dtype: torch.dtype, block_size: int = BLOCK_SIZE
) -> tuple[Tensor, Tensor]:
    pool = torch.zeros(NUM_BLOCKS, 2, 2, block_size, num_heads, dim, dtype=dtype)
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
    block_size: int = BLOCK_SIZE,
) -> Callable[[], object]:
    def call() -> object:
        query = torch.zeros(num_requests * max_rows, heads[0], dim, dtype=dtype)
        keys, values = cache(heads[1], dim, dtype, block_size)
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


def add_norm(width: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x = torch.zeros(4, width, dtype=dtype)
        add_norm_triton(x, None, x[0], 1e-5)
        return add_norm_triton(x, x, x[0], 1e-5)

    return call


def activate(dtype: torch.dtype, *, gelu: bool) -> Callable[[], object]:
    gate_up = torch.zeros(4, 2 * 14_336, dtype=dtype)
    return partial(gelu_mul_triton if gelu else silu_mul_triton, gate_up)


def filter_floor() -> object:
    unlimited = torch.ones(2, dtype=torch.float64)
    limits = torch.zeros(2, dtype=torch.int64)
    return filter_floor_triton(torch.zeros(2, 128_256), limits, unlimited, unlimited)


def gumbel_argmax() -> object:
    keys = torch.zeros(2, 2, dtype=torch.int32)
    return gumbel_argmax_triton(torch.zeros(2, 128_256), torch.zeros(2), keys)


def penalize(num_entries: int = 5, num_rows: int = 2) -> Callable[[], object]:
    """As parts of two tensors, which is how the sampler has them."""

    def call() -> object:
        rows, ids, counts = torch.zeros(3, num_entries, dtype=torch.int64)
        x = torch.zeros(num_rows, 128_256)
        penalize_triton(x, rows, ids, counts, *torch.ones(3, num_rows))
        return None

    return call


def gather_and_digest() -> object:
    pool = torch.zeros(NUM_BLOCKS, 2, 2, BLOCK_SIZE, 8, 128, dtype=torch.bfloat16)
    slots = torch.zeros(2, BLOCK_SIZE, dtype=torch.int64)
    part = Part(0, 2, 0, 8)
    units = gather_units_triton(pool, slots, part, torch.bfloat16)
    scatter_units_triton(units, pool.float(), slots, part)
    read_rows_triton(units.flatten(1).view(torch.int64), torch.zeros(2, dtype=torch.int64))
    return accumulate_triton(units.flatten(1).view(torch.int64), secret_words(1))


def multiply(num_rows: int, width: int, depth: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x, weight = (torch.empty(rows, depth, dtype=dtype) for rows in (num_rows, width))
        return linear_invariant_triton(x, weight)

    return call


def copy(
    stored: torch.dtype, sent: torch.dtype, heads: int, dim: int, tokens: int, num_units: int = 2
) -> Callable[[], object]:
    def call() -> object:
        pool = torch.zeros(NUM_BLOCKS, 2, 2, BLOCK_SIZE, heads, dim, dtype=stored)
        slots = torch.zeros(num_units, tokens, dtype=torch.int64)
        part = Part(0, 2, 0, heads)
        scatter_units_triton(gather_units_triton(pool, slots, part, sent), pool, slots, part)
        return None

    return call


LLAMA = (32, 8)
SAMPLE: list[Callable[[], object]] = [
    attend(LLAMA, 128, torch.bfloat16),
    attend(LLAMA, 128, torch.bfloat16, max_rows=2048, num_requests=1),
    attend(LLAMA, 128, torch.bfloat16, invariant=True),
    attend((28, 4), 64, torch.float16, extras=True, max_rows=2048),
    attend((8, 4), 256, torch.bfloat16, extras=True, max_rows=2048),
    attend((32, 32), 96, torch.float32),
    rotate(128, 128, torch.bfloat16, norms=True),
    rotate(80, 32, torch.float32, norms=False),
    add_norm(4096, torch.bfloat16),
    activate(torch.bfloat16, gelu=False),
    filter_floor,
    gumbel_argmax,
    penalize(),
    gather_and_digest,
    multiply(5, 4096, 4096, torch.bfloat16),
    multiply(100, 4096, 4096, torch.bfloat16),
    multiply(100, 4096, 4096, torch.float32),
]
"""One call of every kernel in the shapes that are served: Llama 3 8B, a window, odd heads."""

STEADY: dict[str, list[Callable[[], object]]] = {
    "attend": [
        attend(LLAMA, 128, torch.bfloat16, max_rows=rows, num_requests=requests, max_context=9000)
        for rows, requests in ((2048, 1), (40, 5), (301, 16), (33, 257))
    ],
    "join": [
        attend(LLAMA, 128, torch.bfloat16, num_requests=requests, max_context=context)
        for requests, context in ((1, 9000), (5, 9000), (3, 5001))
    ],
    "_penalize": [penalize(entries, rows) for entries, rows in ((5, 2), (6, 1), (16, 4), (1, 3))],
    "_linear": [multiply(rows, 4096, 4096, torch.bfloat16) for rows in (1, 5, 16, 64)],
    "_copy": [
        copy(torch.bfloat16, torch.bfloat16, 8, 128, BLOCK_SIZE, num_units=units)
        for units in (1, 2, 33)
    ],
}
"""Calls that differ as steps do: each list is of one kernel, which is compiled once."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
HEADS = {64: (28, 4), 80: (32, 32), 96: (32, 32), 128: (32, 8), 256: (16, 2)}
WIDE_GROUPS = {64: (71, 1), 128: (48, 1), 256: (64, 1)}


def every_attention() -> Iterator[Callable[[], object]]:
    """Decode, with and without splits, verification, chunks; each size, type, and extras."""
    for (dim, heads), dtype in product(HEADS.items(), FLOATS):
        for extras in (False, True):
            yield attend(heads, dim, dtype, num_requests=64, max_context=9000, extras=extras)
            yield attend(heads, dim, dtype, num_requests=1, max_context=9000, extras=extras)
            yield attend(heads, dim, dtype, max_rows=5, num_requests=64, extras=extras)
            yield attend(heads, dim, dtype, max_rows=2048, num_requests=3, extras=extras)
            yield attend(heads, dim, dtype, invariant=True, extras=extras)
            yield attend(heads, dim, dtype, invariant=True, max_rows=2048, extras=extras)
    for (dim, heads), dtype in product(WIDE_GROUPS.items(), FLOATS):
        yield attend(heads, dim, dtype)
        yield attend(heads, dim, dtype, max_rows=2048)
        yield attend(heads, dim, dtype, max_rows=2048, invariant=True)
    for block_size in (1, 8, 24, 32, 64, 128):
        yield attend(LLAMA, 128, torch.bfloat16, block_size=block_size)


def every_layer_kernel() -> Iterator[Callable[[], object]]:
    for dtype in FLOATS:
        for width in (576, 2048, 2560, 4096, 8192, 16_384, 32_768):
            yield add_norm(width, dtype)
        for dim, norms in product(HEADS, (False, True)):
            yield rotate(dim, dim, dtype, norms=norms)
        yield rotate(80, 32, dtype, norms=False)
        yield activate(dtype, gelu=False)
        yield activate(dtype, gelu=True)
        for rows, shape in product(
            (5, 100), ((4096, 4096), (6144, 4096), (4096, 14_336), (576, 64))
        ):
            yield multiply(rows, *shape, dtype)
        yield multiply(5, 128_256, 4096, dtype)


def every_copy() -> Iterator[Callable[[], object]]:
    for stored, sent in product(FLOATS, FLOATS):
        yield copy(stored, sent, 8, 128, BLOCK_SIZE)
    for heads, dim in ((32, 128), (1, 64), (4, 80), (2, 256)):
        yield copy(torch.bfloat16, torch.bfloat16, heads, dim, 256)


EVERY = [*SAMPLE, *every_attention(), *every_layer_kernel(), *every_copy()]
"""What a node can come to launch, each size of heads, type and kind of step."""
