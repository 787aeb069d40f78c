"""The engine alone, without a network: whole steps beside their floor and beside transformers.

The floor of a step is the larger of reading all weights once and the model's linears through MKL's
packed matmul (whatever the engine's own linears are), plus reading the KV cache once. Engine,
floor and transformers take turns, so that a busy machine slows all of them; ratios are medians
over the turns. The last line is one JSON object.

    overhead   what a step takes besides the model's forward pass
    peak_mb    of a process of its own, which loads the model and runs a few steps
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.make_model import Shape, make_model
from benchmarks.quiet import is_quiet
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.packed_linear import MklLinear
from engine.request import Request
from engine.runner import ModelRunner
from wire.types import SamplingParams

CONTEXT = 300
PROMPT = 256
BLOCK_SIZE = 16
MAX_BATCH = 16
STEPS = 8  # per turn
Run = Callable[[], float]


class Probe:
    """Stands before the model and notes how long its forward pass takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seconds = 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._model(*args, **kwargs)
        finally:
            self.seconds = time.perf_counter() - start


class Bench:
    """One loaded model and the engines made of it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        layout = loaded.kv_layout(BLOCK_SIZE)
        self._num_blocks = (MAX_BATCH + 1) * layout.num_blocks(2 * CONTEXT)
        self._store = KVStore(layout, self._num_blocks)
        self._runner = ModelRunner(loaded, self._store)
        self.probe = Probe(loaded.model)
        self._runner._model = self.probe  # what is measured is the runner's own call

    def engine(self) -> Engine:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            max_model_len=2 * CONTEXT,
            max_num_seqs=MAX_BATCH,
            max_num_batched_tokens=MAX_BATCH * CONTEXT,
            enable_prefix_caching=False,
        )
        return Engine(
            config,
            self._runner,
            epoch=1,
            model_fingerprint="bench",
            eos_token_ids=frozenset(),
            ops=self._loaded.ops,
        )

    def decoding(self, batch: int, *, sampled: bool = False) -> Engine:
        """An engine whose requests all have their prompts behind them."""
        engine = self.engine()
        for number in range(batch):
            engine.add(self.request(number, CONTEXT, sampled=sampled))
        engine.step()
        return engine

    def request(self, number: int, num_tokens: int, *, sampled: bool = False) -> Request:
        generator = torch.Generator().manual_seed(number)
        vocabulary = self._loaded.vocab_size
        tokens = torch.randint(vocabulary, (num_tokens,), generator=generator).tolist()
        sampling = SamplingParams(
            seed=number,
            max_tokens=CONTEXT,
            temperature=1.0 if sampled else 0.0,
            top_p=0.95 if sampled else 1.0,
            ignore_eos=True,
        )
        return Request(
            request_id=str(number),
            tokens=tokens,
            num_prompt_tokens=num_tokens,
            sampling=sampling,
            max_num_tokens=num_tokens + CONTEXT,
        )

    def prefill(self) -> float:
        engine = self.engine()
        engine.add(self.request(0, PROMPT))
        return timed(engine.step)


class Floor:
    """The least that a step can cost here: the linears, or reading them; and reading the KV."""

    def __init__(self, shape: Shape) -> None:
        head_dim = shape.hidden_size // shape.heads
        width = shape.hidden_size + 2 * shape.kv_heads * head_dim
        sizes = [
            (width, shape.hidden_size),
            (shape.hidden_size, shape.hidden_size),
            (2 * shape.intermediate_size, shape.hidden_size),
            (shape.hidden_size, shape.intermediate_size),
        ]
        self._layers = [
            MklLinear(torch.randn(size), None) for _ in range(shape.layers) for size in sizes
        ]
        self._head = MklLinear(torch.randn(shape.vocab_size, shape.hidden_size), None)
        num_weights = sum(x.out_features * x.in_features for x in [*self._layers, self._head])
        self._weights = torch.ones(num_weights)
        self._kv = torch.ones(MAX_BATCH, CONTEXT * shape.layers * 2 * shape.kv_heads * head_dim)
        self._inputs: dict[tuple[int, int], Tensor] = {}

    def step(self, rows: int, sampled_rows: int, contexts: int) -> float:
        """Seconds of a step of `rows` that reads the KV of `contexts` requests."""
        linears = timed(lambda: self._linears(rows, sampled_rows))
        read = timed(self._weights.sum)
        return max(linears, read) + (timed(self._kv[:contexts].sum) if contexts else 0.0)

    @torch.inference_mode()
    def _linears(self, rows: int, sampled_rows: int) -> None:
        for layer in self._layers:
            layer(self._input(rows, layer.in_features))
        self._head(self._input(sampled_rows, self._head.in_features))

    def _input(self, rows: int, width: int) -> Tensor:
        if (rows, width) not in self._inputs:
            self._inputs[rows, width] = torch.randn(rows, width)
        return self._inputs[rows, width]


class Transformers:
    """The same model as transformers runs it: its `generate`, its cache, its default attention."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, DynamicCache

        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._new_cache = DynamicCache

    @torch.inference_mode()
    def forwards(self, batch: int) -> Run:
        """Seconds of one decode step as a bare forward pass, each call one step further."""
        cache = self._new_cache(config=self._model.config)
        self._model(torch.randint(1000, (batch, CONTEXT)), past_key_values=cache, logits_to_keep=1)
        token = torch.zeros(batch, 1, dtype=torch.int64)

        @torch.inference_mode()
        def step() -> float:
            def forward() -> None:
                self._model(token, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

            return timed(forward)

        return step

    @torch.inference_mode()
    def decoding(self, batch: int) -> Run:
        """Seconds per decode step of greedy `generate`, over a few tokens from the same context."""
        tokens = torch.randint(1000, (batch, CONTEXT + 1))
        cache = self._new_cache(config=self._model.config)
        self._model(tokens[:, :-1], past_key_values=cache, logits_to_keep=1)

        @torch.inference_mode()
        def steps() -> float:
            if surplus := cache.get_seq_length() - CONTEXT:
                cache.crop(-surplus)
            return timed(lambda: self._generate(tokens, STEPS, past_key_values=cache)) / STEPS

        return steps

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds until `generate` has the first token."""
        tokens = torch.randint(1000, (1, PROMPT))
        return timed(lambda: self._generate(tokens, 1))

    def _generate(self, tokens: Tensor, count: int, **kwargs: Any) -> None:
        self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=count,
            max_new_tokens=count,
            do_sample=False,
            **kwargs,
        )


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds of engine, floor and transformers over the turns."""

    engine: list[float]
    floor: list[float]
    transformers: list[float]

    @property
    def vs_floor(self) -> float:
        return _ratio(self.engine, self.floor)

    @property
    def vs_transformers(self) -> float:
        return _ratio(self.engine, self.transformers)

    def line(self, name: str) -> str:
        ms = [1e3 * statistics.median(x) for x in (self.engine, self.floor, self.transformers)]
        return (
            f"{name:12}  {ms[0]:8.1f}  {ms[1]:7.1f}  {ms[2]:12.1f}"
            f"  {self.vs_floor:8.2f}  {self.vs_transformers:12.2f}"
        )


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def take_turns(turns: int, engine: Run, floor: Run, transformers: Run) -> Figures:
    """Medians of a few runs each, one after the other, `turns` times."""
    figures = Figures([], [], [])
    for turn in range(turns + 1):
        for run, seconds in (
            (engine, figures.engine),
            (floor, figures.floor),
            (transformers, figures.transformers),
        ):
            found = statistics.median(run() for _ in range(STEPS))
            if turn:  # the first turn warms up
                seconds.append(found)
    return figures


def overhead_ms(bench: Bench, turns: int, *, sampled: bool) -> float:
    """What a step of the full batch takes besides the forward pass."""
    engine = bench.decoding(MAX_BATCH, sampled=sampled)
    found = [timed(engine.step) - bench.probe.seconds for _ in range(STEPS * turns)]
    return 1e3 * statistics.median(found)


def peak_mb(folder: Path, storage: str) -> float:
    """Of a process that loads the model, prefills and decodes."""
    command = [sys.executable, "-m", "benchmarks.bench_engine", "--only-run", str(folder)]
    command += ["--weight-dtype", storage]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def only_run(folder: Path, storage: str) -> None:
    """Be the process whose memory is measured."""
    loaded = load_model(folder, dtype="float32", weight_dtype=storage)
    engine = Bench(loaded).decoding(MAX_BATCH)
    for _ in range(STEPS):
        engine.step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure(folder: Path, turns: int) -> dict[str, float]:
    """A line per case; the figures of the last line."""
    peaks = {storage: peak_mb(folder, storage) for storage in ("float32", "int8")}
    bench, floor = Bench(load_model(folder, dtype="float32")), Floor(Shape())
    theirs = Transformers(folder)
    print("step           engine ms  floor ms  transformers ms  vs floor  vs transformers")
    found = {}
    for batch in (1, 8, MAX_BATCH):
        found[batch] = _against(
            turns, bench, batch, _floor_of(floor, batch), theirs.decoding(batch)
        )
        print(found[batch].line(f"decode {batch}"), flush=True)
    bare = _against(
        turns, bench, MAX_BATCH, _floor_of(floor, MAX_BATCH), theirs.forwards(MAX_BATCH)
    )
    print(bare.line(f"bare {MAX_BATCH}"), flush=True)
    prefill = take_turns(turns, bench.prefill, lambda: floor.step(PROMPT, 1, 0), theirs.prefill)
    print(prefill.line(f"prefill {PROMPT}"), flush=True)
    figures = {
        "decode_b1_vs_floor": found[1].vs_floor,
        "decode_b1_vs_transformers": found[1].vs_transformers,
        "decode_b8_vs_floor": found[8].vs_floor,
        "decode_b16_vs_floor": found[MAX_BATCH].vs_floor,
        "decode_b16_vs_transformers": found[MAX_BATCH].vs_transformers,
        "decode_b16_vs_bare_forward": bare.vs_transformers,
        "floor_b16_vs_transformers": _ratio(found[MAX_BATCH].floor, found[MAX_BATCH].transformers),
        "prefill256_vs_floor": prefill.vs_floor,
        "prefill256_vs_transformers": prefill.vs_transformers,
        "floor_prefill256_vs_transformers": _ratio(prefill.floor, prefill.transformers),
        "overhead_ms_b16": overhead_ms(bench, turns, sampled=False),
        "overhead_sampled_ms_b16": overhead_ms(bench, turns, sampled=True),
        "peak_mb": peaks["float32"],
        "peak_mb_int8": peaks["int8"],
    }
    figures |= narrow_figures(folder, bench, turns)
    return {name: round(value, 3) for name, value in figures.items()}


def narrow_figures(folder: Path, bench: Bench, turns: int) -> dict[str, float]:
    """Steps with narrower weights next to those of fp32."""
    found = {}
    for storage in ("bfloat16", "int8"):
        narrow = Bench(load_model(folder, dtype="float32", weight_dtype=storage))
        for batch in (1, MAX_BATCH):
            ours, theirs = narrow.decoding(batch), bench.decoding(batch)
            figures = take_turns(turns, _stepping(ours), _stepping(theirs), _stepping(theirs))
            found[f"decode_b{batch}_{storage}_vs_float32"] = figures.vs_floor
        figures = take_turns(turns, narrow.prefill, bench.prefill, bench.prefill)
        found[f"prefill256_{storage}_vs_float32"] = figures.vs_floor
    for name, value in found.items():
        print(f"{name:36} {value:.2f}", flush=True)
    return found


def _against(turns: int, bench: Bench, batch: int, floor: Run, theirs: Run) -> Figures:
    return take_turns(turns, _stepping(bench.decoding(batch)), floor, theirs)


def _stepping(engine: Engine) -> Run:
    return lambda: timed(engine.step)


def _floor_of(floor: Floor, batch: int) -> Run:
    return lambda: floor.step(batch, batch, batch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=9, help="of engine, floor and transformers")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only-run", type=Path, metavar="MODEL", help=argparse.SUPPRESS)
    parser.add_argument("--weight-dtype", default="float32", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_run:
        only_run(args.only_run, args.weight_dtype)
        return
    quiet_before = is_quiet()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        figures = measure(make_model(Path(folder) / "m88"), args.turns)
    print(json.dumps({**figures, "threads": args.threads, "quiet": quiet_before}))


if __name__ == "__main__":
    main()
