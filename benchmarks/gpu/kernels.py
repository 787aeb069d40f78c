"""What single operations read, write and multiply per second, beside a plain copy and a product.

    python -m benchmarks.gpu.kernels

One layer of Llama 3 8B in bf16, without a model: for tuning kernels. `make bench-gpu` runs the same
cases beside whole steps of the engine. A case counts the bytes that it must read and write once
each. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.clock import Clock, Rate
from benchmarks.gpu.model import LLAMA_8B, Target
from engine.step_inputs import HostRequests
from kernels.block_copy import Part
from kernels.device_rows import DeviceRows
from kernels.ops import PackedRows
from kernels.unit_kernels import REFERENCE, triton_kernels
from kernels.xxh3 import secret_words


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large each case is."""

    copy_bytes: int = 4 << 30
    product: int = 8192
    paged_batch: int = 64
    paged_context: int = 4096
    prompt: int = 8192
    moved_blocks: int = 1024
    digested_bytes: int = 512 << 10  # of a unit


class Cases:
    """Each operation on one device."""

    def __init__(self, target: Target, sizes: Sizes, clock: Clock) -> None:
        self._target, self._sizes, self._clock = target, sizes, clock
        self._device = target.device
        self._units = triton_kernels() if target.has_kernels else REFERENCE

    def copy(self) -> Rate:
        """torch's own copy: the bytes that are read and those that are written."""
        source = torch.empty(self._sizes.copy_bytes, dtype=torch.uint8, device=self._device)
        source.random_()
        target = torch.empty_like(source)
        return Rate(2 * len(source), self._clock.seconds(lambda: target.copy_(source)))

    def product(self) -> Rate:
        """The operations of a square product of noise."""
        size = self._sizes.product
        a, b = self._target.noise(size, size), self._target.noise(size, size)
        return Rate(2 * size**3, self._clock.seconds(lambda: a @ b))

    def paged_decode(self) -> Rate:
        """Attention for one row of each request: the bytes of keys and values that it reads."""
        sizes, shape = self._sizes, self._target.shape
        took = self._attention(sizes.paged_batch, 1, sizes.paged_context)
        numbers = 2 * sizes.paged_batch * sizes.paged_context
        numbers *= shape.kv_heads * self._target.head_dim
        return Rate(numbers * self._target.dtype.itemsize, took)

    def prefill_attention(self) -> Rate:
        """Causal attention over a prompt: the operations of two products over half the pairs."""
        tokens, shape = self._sizes.prompt, self._target.shape
        took = self._attention(1, tokens, tokens)
        return Rate(2 * tokens * tokens * shape.heads * self._target.head_dim, took)

    def _attention(self, num_requests: int, num_rows: int, context: int) -> float:
        """Seconds of one layer's, over scattered blocks."""
        target = self._target
        rows = _requests(self._device, num_requests, num_rows, context, target.block_size)
        keys, values = self._pool(rows.tables.numel())
        packed = PackedRows(HostRequests(rows), laid_out=rows)
        query = target.noise(num_requests * num_rows, target.shape.heads, target.head_dim)
        return self._clock.seconds(
            lambda: target.ops.attention(query, keys, values, packed, scale=0.1)
        )

    def _pool(self, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer of two, as views of a pool."""
        target = self._target
        block = (target.block_size, target.shape.kv_heads, target.head_dim)
        pool = torch.empty((num_blocks, 2, 2, *block), dtype=target.dtype, device=self._device)
        pool.normal_()
        return pool[:, 1, 0], pool[:, 1, 1]

    def gather_and_scatter(self) -> tuple[Rate, Rate]:
        """A quarter of the layers of many blocks, as a handoff takes them: read and written."""
        target, num_blocks = self._target, self._sizes.moved_blocks
        shape, by = target.shape, self._units
        block = (shape.layers, 2, target.block_size, shape.kv_heads, target.head_dim)
        pool = torch.zeros((num_blocks, *block), dtype=target.dtype, device=self._device)
        blocks = torch.randperm(num_blocks, device=self._device)[:, None] * target.block_size
        slots = (blocks + torch.arange(target.block_size, device=self._device)).contiguous()
        part = Part(0, max(1, shape.layers // 4), 0, shape.kv_heads)
        units = by.gather_units(pool, slots, part, target.dtype)
        num_bytes = 2 * units.numel() * units.element_size()
        there = self._clock.seconds(lambda: by.gather_units(pool, slots, part, target.dtype))
        back = self._clock.seconds(lambda: by.scatter_units(units, pool, slots, part))
        return Rate(num_bytes, there), Rate(num_bytes, back)

    def digest(self) -> Rate:
        """XXH3's accumulators of many units: the bytes that are read."""
        by = self._units.accumulate
        num_units, num_bytes = self._sizes.moved_blocks, self._sizes.digested_bytes
        data = torch.ones(num_units, num_bytes // 8, dtype=torch.int64, device=self._device)
        secret = secret_words(1, self._device)
        return Rate(num_units * num_bytes, self._clock.seconds(lambda: by(data, secret)))


def _requests(
    device: torch.device, num_requests: int, num_rows: int, context: int, block_size: int
) -> DeviceRows:
    """Requests of equal rows and contexts, over scattered blocks."""
    num_blocks = -(-context // block_size)
    starts = torch.arange(num_requests + 1)

    def there(numbers: Tensor) -> Tensor:
        return numbers.to(device, torch.int32)

    return DeviceRows(
        first_row=there(starts * num_rows),
        context_len=there(torch.full((num_requests,), context)),
        tables=there(torch.randperm(num_blocks * num_requests)),
        table_start=there(starts[:-1] * num_blocks),
        max_rows=num_rows,
        max_context=context,
    )


@torch.inference_mode()
def figures(cases: Cases) -> dict[str, float]:
    """GB/s, TFLOP/s for products, and the shares of the copy's rate that have a goal."""
    copied, product = cases.copy(), cases.product()
    decode, prefill = cases.paged_decode(), cases.prefill_attention()
    gathered, scattered = cases.gather_and_scatter()
    return {
        "copy_gb_s": copied.per_second / 1e9,
        "product_tflops": product.per_second / 1e12,
        "paged_decode_gb_s": decode.per_second / 1e9,
        "paged_decode_bw": decode.per_second / copied.per_second,
        "gather_gb_s": gathered.per_second / 1e9,
        "scatter_gb_s": scattered.per_second / 1e9,
        "gather_scatter_bw": (gathered + scattered).per_second / copied.per_second,
        "digest_gb_s": cases.digest().per_second / 1e9,
        "prefill_attention_tflops": prefill.per_second / 1e12,
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("kernels: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    target = Target.of("cuda:0", LLAMA_8B)
    print(f"{torch.cuda.get_device_name(target.device)}, torch {torch.__version__}")
    found = figures(Cases(target, Sizes(), Clock(target.device)))
    for name, value in found.items():
        print(f"{name:<26}{value:>10.4g}")
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
