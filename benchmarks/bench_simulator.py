"""`make bench-simulator`: simulated requests per minute of one core; the last line is JSON.

Requests have about the lengths of Azure's conversation trace of 2023 (means of 1,155 prompt and 211
output tokens), drawn log-normally, or are read from a trace. Time is the processor's, which a busy
machine changes less. `--nodes 1000 --blocks 4000 --requests 1000000` is a long run: half an hour or
more, and 2 GB, most of it the names of cached blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from random import Random

from baton.simulation.fleet_run import FleetRun
from baton.simulation.setup import Setup, Split
from benchmarks.quiet import is_quiet
from engine.config import EngineConfig
from tuner.latency import LatencyModel
from tuner.trace import Trace, TracedRequest, first_requests, limit_lengths, scale_rate
from tuner.trace_files import read_trace
from wire.layout import KVLayout

RATE_PER_NODE = 1.5  # requests per second
MAX_MODEL_LEN = 16384
INPUT, OUTPUT = (6.65, 0.9), (5.1, 0.7)  # mean and deviation of the lengths' logarithms
MODEL = LatencyModel((0.010, 5e-5, 1e-9), (0.010, 2e-8, 1e-4), (0.001, 2e-11))
LAYOUT = KVLayout(8, 2, 64, 16, "float16")
ENGINE = EngineConfig(
    num_blocks=20_000, max_model_len=MAX_MODEL_LEN, max_num_seqs=256, max_num_batched_tokens=2048
)
SETUP = Setup(
    Split(prefill=1, decode=1), ENGINE, LAYOUT, MODEL, max_streams=1 << 20, max_waiting=1 << 20
)


def load(number: int, rate: float, path: Path | None) -> Trace:
    """So many requests at this rate."""
    if path is None:
        return scale_rate(_drawn(number), rate)
    trace, _ = limit_lengths(first_requests(read_trace(path), number), MAX_MODEL_LEN)
    return scale_rate(trace, rate / (trace.rate or 1.0))


def _drawn(number: int) -> Trace:
    rng, at = Random(0), 0.0
    found = []
    for _ in range(number):
        at += rng.expovariate(1.0)
        lengths = (int(rng.lognormvariate(*shape)) + 1 for shape in (INPUT, OUTPUT))
        prompt, output = (min(length, MAX_MODEL_LEN // 2) for length in lengths)
        found.append(TracedRequest(at, prompt, output))
    return Trace("drawn", tuple(found))


class TimeIsUpError(Exception):
    """The run ends before its requests have."""


class Watched:
    """A run that says how far it is, and ends in time. What it has done by then counts."""

    EVERY_S = 30.0  # of real time
    LOOK_S = 0.5  # of virtual time

    def __init__(self, run: FleetRun, number: int, limit_s: float) -> None:
        self._run, self._number = run, number
        self._began = self._told = time.monotonic()
        self._limit_s = limit_s
        run.clock.after(self.LOOK_S, self._look)
        try:
            run.run()
            self.complete = True
        except TimeIsUpError:
            self.complete = False

    def _look(self) -> None:
        now, done = time.monotonic(), len(self._run.records)
        if now - self._told > self.EVERY_S:
            self._told = now
            print(
                f"{done} of {self._number} requests, {self._run.clock.now:.0f} simulated seconds, "
                f"{time.process_time():.0f} s of processor time in {now - self._began:.0f} s",
                flush=True,
            )
        if now - self._began > self._limit_s:
            raise TimeIsUpError
        self._run.clock.after(self.LOOK_S, self._look)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--nodes", type=int, default=8, metavar="N", help="half of each kind (%(default)s)")
    add("--requests", type=int, default=10_000, metavar="N", help="(%(default)s)")
    add("--blocks", type=int, default=20_000, metavar="N", help="KV blocks per node (%(default)s)")
    add("--trace", type=Path, metavar="FILE", help="take lengths and order from this")
    add("--quick", action="store_true", help="a tenth of the requests")
    add("--minutes", type=float, default=float("inf"), metavar="M", help="end after so many")
    args = parser.parse_args()
    quiet = is_quiet()
    number = args.requests // 10 if args.quick else args.requests
    trace = load(number, RATE_PER_NODE * args.nodes, args.trace)
    half = max(1, args.nodes // 2)
    setup = replace(
        SETUP,
        split=Split(prefill=half, decode=max(1, args.nodes - half)),
        engine=replace(ENGINE, num_blocks=args.blocks),
    )
    began = time.process_time()
    run = FleetRun(setup, trace)
    made_s = time.process_time() - began
    watched = Watched(run, number, 60 * args.minutes)
    seconds = time.process_time() - began
    most_busy = max(node.engine.busy_s for node in run.nodes.values()) / run.clock.now
    print(
        f"{len(run.records)} requests on {args.nodes} nodes, {run.clock.now:.0f} simulated "
        f"seconds in {seconds:.1f} s of processor time, {made_s:.1f} of them to make the nodes; "
        f"busiest node {most_busy:.0%}"
    )
    figures = {
        "requests_per_minute": round(60 * len(run.records) / seconds),
        "nodes": args.nodes,
        "requests": len(run.records),
        "failed": sum(record.error is not None for record in run.records),
        "complete": watched.complete,
        "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "quiet": quiet,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
