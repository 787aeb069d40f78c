"""The engine on a GPU beside what the same GPU can do: Llama-3-8B's shape, random weights, bf16.

    roofline of a decode step     (weights + KV read) / bandwidth of a large copy, in this run
    MFU of a prefill              operations of linears and attention / rate of a large product
    paged attention, gather       their bytes over the same bandwidth
    handoff                       units from one pool to another one, see gpu/handoff.py

A decode step is a whole one of the engine, from the schedule to the committed tokens, on the host's
clock: as nodes run it on a GPU, launched before the one before it is read, and `sync`, one after
the other, which takes `async_gain` times as long. `replay` is the forward pass alone, on the
device's clock; what a step takes longer is the host's share of it. Medians. The last line is one
JSON object, in which `missed` names the goals that were not reached. About 35 GB of the GPU are
taken.
Without a GPU: `--tiny --device cpu` runs the same code on a toy, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.clock import Clock, Rate, seconds
from benchmarks.gpu.handoff import Handoff
from benchmarks.gpu.kernels import Cases
from benchmarks.gpu.kernels import Sizes as KernelSizes
from benchmarks.gpu.model import LLAMA_8B, TINY, Node, Target, num_weights

AT_MOST = {f"decode_b{batch}_vs_roofline": 1.25 for batch in (1, 16, 64)}
AT_LEAST = {"paged_decode_bw": 0.75, "prefill8k_mfu": 0.55, "gather_scatter_bw": 0.70}


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large each case is."""

    kernels: KernelSizes = field(default_factory=KernelSizes)
    batches: tuple[int, ...] = (1, 16, 64)
    context: int = 1024
    steps: int = 40
    prompt: int = 8192
    prompts: int = 4
    repeats: int = 10
    burst: int = 10


TINY_SIZES = Sizes(
    KernelSizes(1 << 16, 32, 3, 40, 48, 4, 4096),
    context=24,
    steps=3,
    prompt=48,
    prompts=2,
    repeats=2,
    burst=1,
)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Seconds of one batch's decode step."""

    step: float  # launched before the one before it was read
    sync: float  # one after the other
    replay: float  # the graph alone
    floor: float  # reading what must be read


class Bench:
    """Whole steps on one device, beside a bandwidth and a rate of products."""

    def __init__(self, target: Target, sizes: Sizes, bandwidth: float, product_rate: float) -> None:
        self._target, self._sizes = target, sizes
        self._bandwidth, self._product_rate = bandwidth, product_rate
        self._clock = Clock(target.device, sizes.repeats, sizes.burst)
        decoded, block = sizes.context + sizes.steps + 8, target.block_size
        longest = max(decoded, sizes.prompt + 8)
        blocks = max(max(sizes.batches) * -(-decoded // block), 2 * -(-longest // block))
        self._node = Node(target, blocks, sizes.batches, longest)

    def _steps(self, batch: int, *, lookahead: bool) -> float:
        """Seconds from one step's tokens to the next one's."""
        sizes = self._sizes
        engine = self._node.decoding(batch, sizes.context, sizes.steps + 4, lookahead=lookahead)
        for _ in range(3):
            engine.step()
        return statistics.median(seconds(engine.step) for _ in range(sizes.steps))

    @torch.inference_mode()
    def decode(self, batch: int) -> Decoded:
        """One batch's steps."""
        sizes = self._sizes
        sync, ahead = (self._steps(batch, lookahead=lookahead) for lookahead in (False, True))
        graphs = self._node.runner.graphs
        assert graphs is not None
        assert batch in graphs.rungs, f"no graph of {batch} requests: see the log"
        replay = self._clock.seconds(graphs._replays[batch])
        context = sizes.context + 3 + sizes.steps // 2
        weights = num_weights(self._target.shape) * self._target.dtype.itemsize
        read = weights + batch * context * self._target.layout.bytes_per_token
        return Decoded(ahead, sync, replay, read / self._bandwidth)

    def prefill(self) -> tuple[float, float]:
        """Seconds of a step with the whole prompt, and its share of the product's rate."""
        sizes, shape = self._sizes, self._target.shape
        took = []
        for number in range(sizes.prompts):
            engine = self._node.engine(max_num_batched_tokens=sizes.prompt)
            engine.add(self._node.request(number, sizes.prompt, 1))
            took.append(seconds(engine.step))
        per_token = num_weights(shape) - shape.vocab_size * shape.hidden_size  # logits of one row
        attention = 2 * sizes.prompt**2 * shape.layers * shape.hidden_size  # causal: half of all
        operations = 2 * per_token * sizes.prompt + attention
        best = statistics.median(took[1:])
        return best, operations / best / self._product_rate


@torch.inference_mode()
def measure_kernels(cases: Cases) -> tuple[Rate, Rate, dict[str, float]]:
    """The copy, the product, and what has a goal beside them; a line per case."""
    copied, product, figures = cases.copy(), cases.product(), {}
    print(f"copy           {copied.per_second / 1e12:9.3f} TB/s, read and written")
    print(f"product        {product.per_second / 1e12:9.1f} TFLOP/s", flush=True)
    figures["paged_decode_bw"] = cases.paged_decode().per_second / copied.per_second
    print(f"paged decode   {100 * figures['paged_decode_bw']:9.1f} % of the copy's bandwidth")
    gathered, scattered = cases.gather_and_scatter()
    figures["gather_scatter_bw"] = (gathered + scattered).per_second / copied.per_second
    share = 100 * figures["gather_scatter_bw"]
    print(f"gather+scatter {share:9.1f} % of the copy's bandwidth", flush=True)
    return copied, product, figures


def measure_handoff(handoff: Handoff, repeats: int) -> dict[str, float]:
    """Bytes per second from one pool to another, on the host's clock."""
    figures = {}
    for name, way in (("staging", handoff.by_staging), ("cuda_ipc", handoff.by_cuda_ipc)):
        way()  # kernels are compiled, memory is pinned
        took = statistics.median(seconds(way) for _ in range(repeats))
        figures[f"handoff_{name}_gb_s"] = rate = handoff.num_bytes / took / 1e9
        print(f"handoff        {rate:9.2f} GB/s, by {name}", flush=True)
    handoff.close()
    return figures


def measure_steps(bench: Bench, batches: tuple[int, ...]) -> dict[str, float]:
    """Decode at each batch, then a prefill; a line per case."""
    figures: dict[str, float] = {}
    for batch in batches:
        took = bench.decode(batch)
        figures[f"decode_b{batch}_vs_roofline"] = took.step / took.floor
        figures[f"decode_b{batch}_sync_vs_roofline"] = took.sync / took.floor
        figures[f"decode_b{batch}_async_gain"] = took.sync / took.step
        figures[f"decode_b{batch}_host_share"] = 1 - took.replay / took.step
        figures[f"decode_b{batch}_sync_host_share"] = 1 - took.replay / took.sync
        figures[f"replay_b{batch}_vs_roofline"] = took.replay / took.floor
        print(
            f"decode {batch:<7} {1e3 * took.step:9.3f} ms a step, {1e3 * took.sync:.3f} one after "
            f"the other, {1e3 * took.replay:.3f} the replay, {1e3 * took.floor:.3f} the roofline: "
            f"{took.step / took.floor:.2f} x",
            flush=True,
        )
    prefill_s, figures["prefill8k_mfu"] = bench.prefill()
    print(f"prefill        {1e3 * prefill_s:9.1f} ms, {100 * figures['prefill8k_mfu']:.1f} % MFU")
    return figures


def missed(figures: dict[str, float]) -> list[str]:
    """The goals that these figures do not reach."""
    slow = [name for name, most in AT_MOST.items() if not figures[name] <= most]
    return slow + [name for name, least in AT_LEAST.items() if not figures[name] >= least]


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
    clock = Clock(target.device, sizes.repeats, sizes.burst)
    copied, product, figures = measure_kernels(Cases(target, sizes.kernels, clock))
    blocks = max(1, sizes.kernels.moved_blocks // 4)
    figures |= measure_handoff(Handoff(target.layout, blocks, target.device), sizes.repeats)
    bench = Bench(target, sizes, copied.per_second, product.per_second)
    figures |= measure_steps(bench, sizes.batches)
    rounded = {key: float(f"{value:.4g}") for key, value in figures.items()}
    goals = {} if args.tiny else {"missed": missed(figures)}
    print(json.dumps({**rounded, "device": name, "tiny": args.tiny, **goals}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
