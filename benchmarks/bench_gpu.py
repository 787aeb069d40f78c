"""The engine on a GPU beside what the same GPU can do: Llama-3-8B's shape, random weights, bf16.

    roofline of a decode step     (weights + KV read) / bandwidth of a large copy, in this run
    MFU of a prefill              operations of linears and attention / rate of a large product
    paged attention, gather       their bytes over the same bandwidth

A decode step is a whole one of the engine, from the schedule to the committed tokens, on the host's
clock; `replay` is its forward pass alone, on the device's. Medians. The last line is one JSON
object. Without a GPU: `--tiny --device cpu` runs the same code on a toy, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_bench_model import LLAMA_8B, TINY, Node, Target, num_weights
from kernels.block_copy import Part, gather_units, scatter_units
from kernels.device_rows import DeviceRows
from kernels.ops import PackedRows
from kernels.paged_attention import RequestRows


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large each case is."""

    copy_bytes: int = 4 << 30
    product: int = 8192
    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    steps: int = 40
    paged_batch: int = 64
    paged_context: int = 4096
    prompt: int = 8192
    repeats: int = 10
    moved_blocks: int = 1024


TINY_SIZES = Sizes(1 << 16, 32, (1, 16, 64), 24, 3, 3, 40, 48, 2, 4)


class Clock:
    """Times work on a device: events on the stream where there is one."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def median(self, work: Callable[[], object], repeats: int) -> float:
        """Seconds of one call on the device, after two that warm up."""
        for _ in range(2):
            work()
        return statistics.median(self._once(work) for _ in range(repeats))

    def _once(self, work: Callable[[], object]) -> float:
        if not self._on_gpu:
            return seconds(work)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def seconds(work: Callable[[], object]) -> float:
    """Of one call, on the host's clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """All cases on one device."""

    def __init__(self, target: Target, sizes: Sizes) -> None:
        self._target, self._sizes = target, sizes
        self._clock = Clock(target.device)
        self.bandwidth = self._measure_bandwidth()
        self.product_rate = self._measure_product()
        block, longest = target.block_size, max(sizes.context + sizes.steps + 8, sizes.prompt + 8)
        blocks = max(sizes.batches) * -(-(sizes.context + sizes.steps + 8) // block)
        blocks = max(blocks, sizes.paged_batch * -(-sizes.paged_context // block))
        blocks = max(blocks, 2 * -(-longest // block), 2 * sizes.moved_blocks)
        self._node = Node(target, blocks, sizes.batches, longest)

    def _measure_bandwidth(self) -> float:
        """Bytes per second of a copy, those read and those written."""
        source = torch.empty(
            self._sizes.copy_bytes, dtype=torch.uint8, device=self._target.device
        ).random_()
        target = torch.empty_like(source)
        took = self._clock.median(lambda: target.copy_(source), self._sizes.repeats)
        return 2 * len(source) / took

    def _measure_product(self) -> float:
        """Operations per second of a square product of noise."""
        size = self._sizes.product
        a, b = self._target.noise(size, size), self._target.noise(size, size)
        return 2 * size**3 / self._clock.median(lambda: a @ b, self._sizes.repeats)

    @torch.inference_mode()
    def decode(self, batch: int) -> tuple[float, float, float]:
        """Seconds of a step, of its replay, and of reading what it must read."""
        sizes = self._sizes
        engine = self._node.decoding(batch, sizes.context, sizes.steps + 4)
        for _ in range(3):
            engine.step()
        steps = [seconds(engine.step) for _ in range(sizes.steps)]
        graphs = self._node.runner.graphs
        assert graphs is not None
        replay = self._clock.median(graphs._replays[batch], sizes.repeats)
        context = sizes.context + 3 + sizes.steps // 2
        weights = num_weights(self._target.shape) * self._target.dtype.itemsize
        read = weights + batch * context * self._target.layout.bytes_per_token
        return statistics.median(steps), replay, read / self.bandwidth

    @torch.inference_mode()
    def paged_attention(self) -> float:
        """Share of the bandwidth of one layer's decode attention, layers taking turns."""
        sizes, target, store = self._sizes, self._target, self._node.store
        per_request = -(-sizes.paged_context // target.block_size)
        blocks = torch.randperm(store.num_blocks - 1, device=target.device)
        rows = [
            RequestRows(n, 1, sizes.paged_context, blocks[n * per_request : (n + 1) * per_request])
            for n in range(sizes.paged_batch)
        ]
        packed = PackedRows(rows, laid_out=DeviceRows.of(rows))
        query = target.noise(sizes.paged_batch, target.shape.heads, target.head_dim)

        def all_layers() -> None:
            for layer in range(target.shape.layers):
                target.ops.attention(
                    query, store.keys(layer), store.values(layer), packed, scale=1.0
                )

        took = self._clock.median(all_layers, sizes.repeats)
        read = sizes.paged_batch * sizes.paged_context * target.layout.bytes_per_token
        return read / took / self.bandwidth

    def prefill(self) -> tuple[float, float]:
        """Seconds of a step with the whole prompt, and its share of the product's rate."""
        sizes, shape = self._sizes, self._target.shape
        took = []
        for number in range(4):
            engine = self._node.engine(max_num_batched_tokens=sizes.prompt)
            engine.add(self._node.request(number, sizes.prompt, 1))
            took.append(seconds(engine.step))
        per_token = num_weights(shape) - shape.vocab_size * shape.hidden_size  # logits of one row
        attention = 2 * sizes.prompt**2 * shape.layers * shape.hidden_size  # causal: half of all
        operations = 2 * per_token * sizes.prompt + attention
        best = statistics.median(took[1:])
        return best, operations / best / self.product_rate

    @torch.inference_mode()
    def gather_scatter(self) -> float:
        """Share of the copy's bandwidth, of blocks gathered into units and scattered again."""
        target, pool = self._target, self._node.store.blocks
        gather: Callable[[Tensor, Tensor, Part, torch.dtype], Tensor] = gather_units
        scatter: Callable[[Tensor, Tensor, Tensor, Part], None] = scatter_units
        if target.device.type == "cuda":
            from kernels.triton_blocks import gather_units_triton, scatter_units_triton

            gather, scatter = gather_units_triton, scatter_units_triton
        blocks = torch.randperm(len(pool) - 1, device=target.device)[: self._sizes.moved_blocks]
        within = torch.arange(target.block_size, device=target.device)
        slots = (blocks[:, None] * target.block_size + within).contiguous()
        part = Part(0, target.shape.layers, 0, target.shape.kv_heads)
        units = gather(pool, slots, part, target.dtype)
        took = self._clock.median(
            partial(gather, pool, slots, part, target.dtype), self._sizes.repeats
        )
        took += self._clock.median(partial(scatter, units, pool, slots, part), self._sizes.repeats)
        moved = 2 * 2 * units.numel() * units.element_size()  # read and written, there and back
        return moved / took / self.bandwidth


def measure(bench: Bench, batches: tuple[int, ...]) -> dict[str, float]:
    """A line per case; the figures of the last line."""
    figures: dict[str, float] = {}
    print(f"copy           {bench.bandwidth / 1e12:9.3f} TB/s, read and written")
    print(f"product        {bench.product_rate / 1e12:9.1f} TFLOP/s")
    for batch in batches:
        step, replay, floor = bench.decode(batch)
        figures[f"decode_b{batch}_vs_roofline"] = step / floor
        figures[f"replay_b{batch}_vs_roofline"] = replay / floor
        print(
            f"decode {batch:<7} {1e3 * step:9.3f} ms a step, {1e3 * replay:.3f} its replay, "
            f"{1e3 * floor:.3f} the roofline: {step / floor:.2f} x",
            flush=True,
        )
    figures["paged_decode_bw"] = bench.paged_attention()
    print(f"paged decode   {100 * figures['paged_decode_bw']:9.1f} % of the copy's bandwidth")
    took, figures["prefill8k_mfu"] = bench.prefill()
    print(f"prefill        {1e3 * took:9.1f} ms, {100 * figures['prefill8k_mfu']:.1f} % MFU")
    figures["gather_scatter_bw"] = bench.gather_scatter()
    print(f"gather+scatter {100 * figures['gather_scatter_bw']:9.1f} % of the copy's bandwidth")
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu with --tiny (cuda:0)")
    parser.add_argument("--tiny", action="store_true", help="a toy, to see that the code runs")
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        print("bench_gpu: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    if args.device == "cpu" and not args.tiny:
        print("bench_gpu: --device cpu takes --tiny; an 8 B model says nothing", file=sys.stderr)
        return 1
    sizes = TINY_SIZES if args.tiny else Sizes()
    target = Target.of(args.device, TINY if args.tiny else LLAMA_8B)
    name = "cpu" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"{name}, torch {torch.__version__}, operations {target.ops.name}")
    figures = measure(Bench(target, sizes), sizes.batches)
    print(json.dumps({**figures, "device": name, "tiny": args.tiny}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
