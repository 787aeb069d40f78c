"""What the Triton kernels read, write and multiply per second, beside a plain copy on the device.

    python -m benchmarks.gpu.kernels

One layer of Llama 3 8B in bf16, without a model: for tuning kernels, which `make bench-gpu` then
shows within the engine. A kernel counts the bytes that it must read and write once each. The last
line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.block_copy import Part
from kernels.device_rows import DeviceRows
from kernels.triton_attention import paged_attention_triton
from kernels.triton_blocks import gather_units_triton, scatter_units_triton
from kernels.triton_digest import accumulate_triton
from kernels.xxh3 import secret_words

REPEATS = 20
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model decides the sizes."""

    num_layers: int = 32
    query_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Rate:
    """How much was done in how many seconds: bytes or floating point operations."""

    amount: float
    seconds: float

    @property
    def per_second(self) -> float:
        return self.amount / self.seconds


LLAMA = Shape()


def figures(device: torch.device, shape: Shape = LLAMA) -> dict[str, float]:
    """GB/s, TFLOP/s for prefill, and the shares of the copy's rate that have a goal."""
    copied = device_copy(device)
    decode = paged_decode(device, shape=shape)
    gathered, scattered = gather_and_scatter(device, shape=shape)
    digested = digest(device)
    prefilled = prefill_attention(device, shape=shape)
    moved = Rate(gathered.amount + scattered.amount, gathered.seconds + scattered.seconds)
    return {
        "copy_gb_s": copied.per_second / 1e9,
        "paged_decode_gb_s": decode.per_second / 1e9,
        "paged_decode_bw": decode.per_second / copied.per_second,
        "gather_gb_s": gathered.per_second / 1e9,
        "scatter_gb_s": scattered.per_second / 1e9,
        "gather_scatter_bw": moved.per_second / copied.per_second,
        "digest_gb_s": digested.per_second / 1e9,
        "prefill_attention_tflops": prefilled.per_second / 1e12,
    }


def device_copy(device: torch.device, num_bytes: int = 1 << 30) -> Rate:
    """torch's own copy: what is read and written."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rate(2 * num_bytes, seconds_of(lambda: target.copy_(source), device))


def paged_decode(
    device: torch.device, batch: int = 64, context: int = 4096, shape: Shape = LLAMA
) -> Rate:
    """One layer's attention for one row of each request: the keys and values that it reads."""
    rows = _requests(device, [(1, context)] * batch, shape.block_size)
    keys, values = _pool(device, rows.tables.numel(), shape)
    query = torch.randn(batch, shape.query_heads, shape.head_dim, device=device, dtype=shape.dtype)
    seconds = seconds_of(
        lambda: paged_attention_triton(query, keys, values, rows, scale=0.1), device
    )
    num_numbers = 2 * batch * context * shape.kv_heads * shape.head_dim
    return Rate(num_numbers * shape.dtype.itemsize, seconds)


def prefill_attention(device: torch.device, tokens: int = 8192, shape: Shape = LLAMA) -> Rate:
    """One layer's causal attention over a prompt: two products over half of the pairs."""
    rows = _requests(device, [(tokens, tokens)], shape.block_size)
    keys, values = _pool(device, rows.tables.numel(), shape)
    query = torch.randn(tokens, shape.query_heads, shape.head_dim, device=device, dtype=shape.dtype)
    seconds = seconds_of(
        lambda: paged_attention_triton(query, keys, values, rows, scale=0.1), device
    )
    return Rate(2 * tokens * tokens * shape.query_heads * shape.head_dim, seconds)


def gather_and_scatter(
    device: torch.device, num_units: int = 512, shape: Shape = LLAMA
) -> tuple[Rate, Rate]:
    """A quarter of the layers of many blocks, as a handoff takes them: read and written."""
    layers = max(1, shape.num_layers // 4)
    part = Part(0, layers, 0, shape.kv_heads)
    sizes = (num_units, shape.num_layers, 2, shape.block_size, shape.kv_heads, shape.head_dim)
    pool = torch.zeros(sizes, dtype=shape.dtype, device=device)
    blocks = torch.randperm(num_units, device=device)[:, None] * shape.block_size
    slots = (blocks + torch.arange(shape.block_size, device=device)).contiguous()
    units = gather_units_triton(pool, slots, part, shape.dtype)
    num_bytes = 2 * units.numel() * units.element_size()
    gather = seconds_of(lambda: gather_units_triton(pool, slots, part, shape.dtype), device)
    scatter = seconds_of(lambda: scatter_units_triton(units, pool, slots, part), device)
    return Rate(num_bytes, gather), Rate(num_bytes, scatter)


def digest(device: torch.device, num_units: int = 512, num_bytes: int = 512 << 10) -> Rate:
    """XXH3's accumulators of many units: the bytes that are read."""
    data = torch.ones(num_units, num_bytes // 8, dtype=torch.int64, device=device)
    secret = secret_words(1, device)
    return Rate(num_units * num_bytes, seconds_of(lambda: accumulate_triton(data, secret), device))


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of many calls, each timed by the device itself."""
    for _ in range(WARM_UPS):
        call()
    timed = _timed_on_gpu if device.type == "cuda" else _timed_here
    return statistics.median(timed(call) for _ in range(REPEATS))


def _timed_on_gpu(call: Callable[[], object]) -> float:
    make: Callable[..., Any] = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _timed_here(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _requests(device: torch.device, shapes: list[tuple[int, int]], block_size: int) -> DeviceRows:
    """Requests (rows, context) of equal contexts, over scattered blocks."""
    first_row = torch.tensor([0, *(rows for rows, _ in shapes)]).cumsum(0)
    num_blocks = -(-shapes[0][1] // block_size)
    tables = torch.randperm(num_blocks * len(shapes)).view(len(shapes), num_blocks)
    return DeviceRows(
        first_row=first_row.to(device, torch.int32),
        context_len=torch.tensor([c for _, c in shapes], dtype=torch.int32, device=device),
        tables=tables.to(device, torch.int32),
        table_start=torch.arange(len(shapes), dtype=torch.int32, device=device) * num_blocks,
        max_rows=max(rows for rows, _ in shapes),
        max_context=max(context for _, context in shapes),
    )


def _pool(device: torch.device, num_blocks: int, shape: Shape) -> tuple[Tensor, Tensor]:
    """Keys and values of one layer of two, as views of a pool."""
    sizes = (num_blocks, 2, 2, shape.block_size, shape.kv_heads, shape.head_dim)
    pool = torch.zeros(sizes, dtype=shape.dtype, device=device).normal_()
    return pool[:, 1, 0], pool[:, 1, 1]


def main() -> int:
    if not torch.cuda.is_available():
        print("kernels: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    found = figures(device)
    for name, value in found.items():
        print(f"{name:<26}{value:>10.4g}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
