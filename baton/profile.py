"""`baton profile`: what steps of one engine take on this machine, fitted for the planner.

Steps run through the product's own engine, without a network: prompts of many lengths behind cached
prefixes of many lengths, then decodes of many batches at many contexts. Of a transfer, what both
nodes do with a block is measured (the digest here; copy, digest there); what lies between two
machines is told with `--link-gbit-s` and `--link-latency-ms`.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random

import torch

from baton.bundled_model import DEFAULT_MODEL
from baton.device_names import device_text
from baton.profile_load import under_load
from baton.simulation.setup import HOP_S, HOPS_TO_FIRST_TOKEN
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.numerics import dtype_name
from engine.request import Request
from engine.runner import ModelRunner
from kvtransfer.digest import UnitSealer
from kvtransfer.units import units_of
from node.machine import look
from tuner.files import check_places
from tuner.flags import at_least_one, positive
from tuner.latency import (
    LatencyModel,
    Sample,
    StepWork,
    decode_sample,
    fit,
    prefill_sample,
    relative_errors,
    transfer_sample,
)
from tuner.overheads import Overheads, overheads_of
from tuner.probe import check, probe
from tuner.profile import Profile, fit_error, save_profile
from tuner.quiet import noisy_line, spread_of, undisturbed
from wire.errors import ConfigError
from wire.geometry import geometry_for
from wire.layout import KVLayout
from wire.types import AttemptId, SamplingParams

Stopwatch = Callable[[], float]
BLOCK_SIZE = 16
MAX_KV_BYTES = 1 << 30
CHUNKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PREFIXES = (0, 256, 1024, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024, 4096)
REPEATS = 5
LOAD_S = 30.0  # of requests that come and go
TRANSFER_BLOCKS = (1, 4, 16, 64)
EXAMPLES = """example, the second with what a fleet adds to its engines' steps:
  baton profile ./my-model -o profile.json --threads 1

  baton serve ./my-model --prefill 1 --decode 1 --threads 1 --handoff always
  baton profile ./my-model -o profile.json --threads 1 --fleet http://127.0.0.1:8000

`baton plan` reads the file. Run it on a machine that does nothing else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `baton profile`."""
    parser.epilog = EXAMPLES
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=DEFAULT_MODEL, help="folder (the bundled model)")
    add("-o", "--output", type=Path, required=True, metavar="FILE", help="where to write it")
    add("--threads", type=at_least_one, default=1, metavar="N", help="of one node (%(default)s)")
    add("--dtype", default="auto", help="as the nodes' (%(default)s)")
    add(
        "--max-model-len",
        type=at_least_one,
        metavar="N",
        help="as the nodes' (all that the model can)",
    )
    add("--seconds", type=positive, default=110.0, metavar="S", help="at most about (%(default)g)")
    add(
        "--fleet",
        metavar="URL",
        help="measure the overheads too of an idle fleet of one prefill and one decode node as "
        "these, served with --handoff always",
    )
    add("--chunk", type=int, default=512, metavar="N", help="its --max-num-batched-tokens (512)")
    add("--link-gbit-s", type=positive, metavar="R", help="rate between nodes, if not one machine")
    add("--link-latency-ms", type=float, default=0.2, metavar="MS", help="(%(default)g)")


def run(args: argparse.Namespace) -> int:
    """Measure, fit, write, and say how well it fits."""
    check_places(args.output)
    torch.set_num_threads(args.threads)
    loaded = load_model(args.model, dtype=args.dtype, max_model_len=args.max_model_len)
    if args.fleet:
        asyncio.run(check(args.fleet, loaded.name))
    layout = loaded.kv_layout(BLOCK_SIZE)
    profiler = Profiler(loaded, layout, stopwatch_for(loaded.device, args.threads))
    prefill = profiler.prefills(args.seconds / 2)
    decode = profiler.decodes(args.seconds / 2)
    transfer = transfers(layout, args.link_gbit_s, args.link_latency_ms)
    profile = fitted(loaded, layout, device_name(loaded, args.threads), prefill, decode, transfer)
    profile = replace(profile, spread=profiler.spread())
    if args.fleet:
        profile = with_fleet(profile, args.fleet, args.chunk)
    save_profile(profile, args.output)
    for name, error in profile.errors.items():
        print(
            f"{name:9} {error.num_samples:4} samples, off by {error.p50:.1%} (median), "
            f"{error.p90:.1%} (90th percentile)"
        )
    if args.fleet:
        print(fleet_line(profile.overheads))
    if line := noisy_line(profile.spread):
        print(line)
    return 0


def with_fleet(profile: Profile, url: str, chunk: int) -> Profile:
    """The profile with what a running fleet takes besides its engines' steps. ConfigError."""
    told = asyncio.run(probe(url, profile.model_name, chunk, profile.max_model_len, print))
    typical = told.alone[len(told.alone) // 2].prompt_tokens
    size = profile.layout.num_blocks(typical) * profile.layout.block_bytes
    last_slice = profile.latency.transfer_s(size) / geometry_for(profile.layout).num_layer_groups
    hops_s, handoff_hop_s = HOPS_TO_FIRST_TOKEN * HOP_S, HOP_S + last_slice
    try:
        found = overheads_of(told, profile.latency, chunk, hops_s, handoff_hop_s)
    except ValueError as error:
        raise ConfigError(f"{url} was not idle: {error}") from error
    profile = replace(profile, overheads=found, spread={**profile.spread, "fleet": told.spread})
    print("requests that come and go")
    return replace(profile, overheads=under_load(profile, url, chunk, LOAD_S, seed=1))


def fleet_line(found: Overheads) -> str:
    return (
        f"fleet     {found.front_s * 1e3:.2f} ms per request, {found.handoff_s * 1e3:.2f} ms per "
        f"handoff; a decode step {found.step_s * 1e3:+.2f} ms {found.stream_s * 1e3:+.3f} ms per "
        f"stream, all of it {found.decode_factor:.2f} times, a prefill "
        f"{found.prefill_factor:.2f} times the engine's; while both compute "
        f"{found.prefill_slowdown:.2f} (prefill) and {found.decode_slowdown:.2f} times (decode)"
    )


def stopwatch_for(device: str, threads: int) -> Stopwatch:
    """Processor time where one thread computes all: who else runs, or steals, is not in it."""
    return time.thread_time if device == "cpu" and threads == 1 else time.perf_counter


def device_name(loaded: LoadedModel, threads: int) -> str:
    """What decides the speed, in words."""
    device = look().cpu_model if loaded.device == "cpu" else torch.cuda.get_device_name()
    return device_text(device, threads, dtype_name(loaded.dtype))


def fitted(
    loaded: LoadedModel,
    layout: KVLayout,
    device: str,
    prefill: list[Sample],
    decode: list[Sample],
    transfer: list[Sample],
) -> Profile:
    a, b, c = fit(prefill, 3)
    d, e, f = fit(decode, 3)
    g, h = fit(transfer, 2)
    model = LatencyModel((a, b, c), (d, e, f), (g, h))
    errors = {
        "prefill": fit_error(relative_errors(model.prefill, prefill)),
        "decode": fit_error(relative_errors(model.decode, decode)),
        "transfer": fit_error(relative_errors(model.transfer, transfer)),
    }
    return Profile(
        model_name=loaded.name,
        model_fingerprint=loaded.fingerprint,
        device=device,
        max_model_len=loaded.max_model_len,
        layout=layout,
        latency=model,
        errors=errors,
    )


class Profiler:
    """One engine after the other on one loaded model. `repeats` are the seconds of each case."""

    def __init__(
        self,
        loaded: LoadedModel,
        layout: KVLayout,
        stopwatch: Stopwatch,
        clock: Stopwatch = time.perf_counter,
    ) -> None:
        self.repeats: list[list[float]] = []
        self._stopwatch = stopwatch
        self._took_s = self._passed_s = 0.0  # of all steps
        self._loaded = loaded
        self._layout = layout
        self._clock = clock
        self._num_blocks = max(
            2 * layout.num_blocks(loaded.max_model_len), MAX_KV_BYTES // layout.block_bytes
        )
        self._store = KVStore(layout, self._num_blocks)
        self._runner = ModelRunner(loaded, self._store)
        self._random = Random(0)
        self._numbers = count()

    def _engine(self, *, prefix_caching: bool) -> Engine:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            max_model_len=self._loaded.max_model_len,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=self._loaded.max_model_len,
            enable_prefix_caching=prefix_caching,
        )
        return Engine(
            config,
            self._runner,
            epoch=1,
            model_fingerprint=self._loaded.fingerprint,
            eos_token_ids=frozenset(),
            ops=self._loaded.ops,
        )

    def _request(self, tokens: list[int], max_tokens: int) -> Request:
        return Request(
            request_id=str(next(self._numbers)),
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            max_num_tokens=len(tokens) + max_tokens,
        )

    def _tokens(self, number: int) -> list[int]:
        return [self._random.randrange(self._loaded.vocab_size) for _ in range(number)]

    def _timed_step(self, engine: Engine) -> float:
        begin, start = self._clock(), self._stopwatch()
        engine.step()
        took = self._stopwatch() - start
        self._took_s, self._passed_s = self._took_s + took, self._passed_s + self._clock() - begin
        return took

    def spread(self) -> dict[str, float]:
        """How far repeats are apart, and for what part of a step the processor was elsewhere."""
        elsewhere = 1 - self._took_s / self._passed_s
        return {"engine": spread_of(self.repeats), "processor elsewhere": max(0.0, elsewhere)}

    # ------------------------------------------------------------ prefill

    def prefills(self, seconds: float) -> list[Sample]:
        """Every case once, the cheapest first, then all again until the time is over."""
        end = self._clock() + seconds
        engine = self._engine(prefix_caching=True)
        prefixes = {n: self._tokens(n) for n in PREFIXES if n < self._loaded.max_model_len}
        for tokens in prefixes.values():
            if tokens:
                self._prefill(engine, tokens)
        self._prefill(engine, self._tokens(BLOCK_SIZE))  # warms up
        took: dict[tuple[int, int], list[float]] = defaultdict(list)
        for turn in range(REPEATS):
            for prefix, chunk in self._prefill_cases(prefixes):
                if turn and self._clock() > end:
                    break
                tokens = prefixes[prefix] + self._tokens(chunk)
                took[prefix, chunk].append(self._prefill(engine, tokens))
        self.repeats += took.values()
        return [
            prefill_sample(StepWork(n, (prefix + n) ** 2 - prefix**2), undisturbed(seconds))
            for (prefix, n), seconds in took.items()
        ]

    def _prefill_cases(self, prefixes: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
        for chunk in CHUNKS:
            for prefix in prefixes:
                if prefix + chunk < self._loaded.max_model_len:
                    yield prefix, chunk

    def _prefill(self, engine: Engine, tokens: list[int]) -> float:
        """One step, after which the request is over; its blocks stay findable."""
        engine.add(self._request(tokens, 1))
        return self._timed_step(engine)

    # ------------------------------------------------------------ decode

    def decodes(self, seconds: float) -> list[Sample]:
        """Contexts from the shortest; those that the time or the pool does not reach are left."""
        end = self._clock() + seconds
        samples: list[Sample] = []
        for context in CONTEXTS:
            if context + 4 * REPEATS * len(BATCHES) > self._loaded.max_model_len:
                break
            samples += self._decodes_at(context, end)
            if self._clock() > end:
                break
        return samples

    def _decodes_at(self, context: int, end: float) -> list[Sample]:
        """Batches grow; each is timed for a few steps."""
        engine = self._engine(prefix_caching=False)
        most = 4 * REPEATS * len(BATCHES)
        running: list[Request] = []
        samples: list[Sample] = []
        for batch in BATCHES:
            if batch * self._layout.num_blocks(context + most) > self._num_blocks:
                break
            while len(running) < batch:
                running.append(self._request(self._tokens(context), most))
                engine.add(running[-1])
                engine.step()
            steps = [self._timed_step(engine) for _ in range(REPEATS)]
            tokens = sum(request.num_tokens for request in running) - batch * (REPEATS // 2 + 1)
            work = StepWork(decode_batch=batch, decode_context=tokens)
            self.repeats.append(steps)
            samples.append(decode_sample(work, undisturbed(steps)))
            if self._clock() > end:
                break
        return samples


def transfers(layout: KVLayout, link_gbit_s: float | None, link_latency_ms: float) -> list[Sample]:
    """Digest, copy and digest of some blocks, and the link between."""
    samples = []
    size = layout.block_bytes
    for num_blocks in TRANSFER_BLOCKS:
        num_tokens = num_blocks * layout.block_size
        sealer = UnitSealer(
            key=bytes(16),
            id=AttemptId("profile", 1),
            lease=1,
            tokens=range(num_tokens),
            block_size=layout.block_size,
            model_fingerprint="profile",
            cache_salt="",
        )
        source, target = memoryview(bytearray(num_blocks * size)), memoryview(bytearray(size))
        units = units_of(num_tokens, 0, layout)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for unit in units:
                block = source[unit.block * size : (unit.block + 1) * size]
                sealer.digest(unit, block)
                sealer.seal(unit, sealer.copy(block, target))
            seconds.append(time.perf_counter() - start)
        link = link_latency_ms / 1e3
        link += num_blocks * size * 8 / (link_gbit_s * 1e9) if link_gbit_s else 0.0
        samples.append(transfer_sample(num_blocks * size, undisturbed(seconds) + link))
    return samples
