"""`make validate-simulator`: three workloads on real nodes and in the simulator, side by side.

One prefill and one decode node of one thread each serve a model. In the same run its engine is
profiled and the fleet's overheads are measured, before the workloads and once more after them: a
machine is not always as fast. Between, each workload runs several times for real, at a rate at
which the busiest node computes half of the time. It is simulated with both profiles, and the mean
is compared:

    chats      short prompts, Poisson arrivals
    azure      lengths and times in Azure's format, scaled
    mooncake   requests that share prefixes, scaled

The latter two are the synthetic samples; `--recorded` takes the beginnings of the public traces
where they lie beside this checkout.

The last line is JSON: the worst error of each figure over the workloads. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from baton.bundled_model import DEFAULT_MODEL
from baton.simulation.setup import Split
from baton.simulation.simulate import simulate
from benchmarks.make_model import make_model
from benchmarks.planning.figures import Figures, Row, compare, figures_of, table, worst
from benchmarks.planning.real import (
    MAX_MODEL_LEN,
    Bench,
    at_utilisation,
    bare,
    drawn,
    replay,
    setup_of,
    unloaded,
)
from benchmarks.quiet import is_quiet
from benchmarks.serve.processes import ROOT
from tuner.goodput import Slo
from tuner.profile import Profile
from tuner.trace import Trace, first_requests, limit_lengths, scale_lengths
from tuner.trace_files import read_trace
from tuner.workload import Span

SAMPLES = ROOT / "tuner" / "samples"
SPLIT = Split(prefill=1, decode=1)
MEAN_INPUT = 160  # tokens, to which traces are scaled
NUM_DRAWN = 200
RECORDED = ROOT.parent / "shared" / "data" / "traces"
LEAST = 20  # requests of a run: a recorded trace may begin with a lull
MOST = 400  # of a trace that are looked at
UTILISATION = 0.5


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    runs: int
    seconds: float  # per run
    profile_s: float


FULL = Effort(3, 25.0, 45.0)
QUICK = Effort(1, 8.0, 10.0)


def traces(azure: Path, mooncake: Path) -> list[Trace]:
    chats = drawn("chats", NUM_DRAWN, Span(32, 2 * MEAN_INPUT - 32), Span(16, 48), seed=1)
    return [chats, scaled("azure", read_trace(azure)), scaled("mooncake", read_trace(mooncake))]


def scaled(name: str, trace: Trace) -> Trace:
    """With prompts of MEAN_INPUT tokens on average, whatever machine they were recorded for."""
    factor = MEAN_INPUT / mean(request.input_len for request in trace.requests)
    told = scale_lengths(trace, factor)
    print(f"{name}: {trace.name}, {len(trace.requests)} requests, lengths times {factor:.3g}")
    fitting, _ = limit_lengths(told, MAX_MODEL_LEN)
    return Trace(name, fitting.requests[:MOST], fitting.block_len)


def recorded(name: str, sample: Path) -> Path:
    """The public trace; where it is absent a word, and the sample."""
    path = RECORDED / name
    if path.is_file():
        return path
    print(f"no recorded trace at {path}: {sample.name} of the samples instead")
    return sample


def shortened(trace: Trace, seconds: float) -> Trace:
    """At a rate of its own, so many seconds of it."""
    return first_requests(trace, max(LEAST, sum(r.at <= seconds for r in trace.requests)))


@dataclass(frozen=True, slots=True)
class Replayed:
    """A workload, and what its real runs were like."""

    trace: Trace
    slo: Slo
    real: list[Figures]

    def beside(self, profiles: Sequence[Profile]) -> list[Row]:
        simulated = [
            figures_of(simulate(setup_of(profile, SPLIT), self.trace).records, self.slo)
            for profile in profiles
        ]
        return compare(self.trace.name, self.real, simulated)


class Replays:
    """The real runs of one fleet. Its profile only says how many requests are half a load."""

    def __init__(self, url: str, profile: Profile, effort: Effort) -> None:
        self._url = url
        self._setup = setup_of(profile, SPLIT)
        self._effort = effort
        self._began = time.perf_counter()
        self._seed = 100

    def of(self, whole: Trace) -> Replayed:
        trace, _ = at_utilisation(self._setup, whole, UTILISATION)
        trace = shortened(trace, self._effort.seconds)
        trace, busiest = at_utilisation(self._setup, trace, UTILISATION)
        slo = unloaded(self._setup, trace)
        self._say(
            f"{trace.name}: {len(trace.requests)} requests, {trace.rate:.2f} per second, busiest "
            f"node {busiest:.0%}; limits {slo.ttft_s * 1e3:.0f} ms TTFT, "
            f"{slo.tpot_s * 1e3:.1f} ms TPOT"
        )
        real = []
        for number in range(self._effort.runs):
            self._seed += 1
            real.append(figures_of(replay(self._url, trace, self._seed), slo))
            self._say(f"  run {number + 1} of {self._effort.runs} done")
        return Replayed(trace, slo, real)

    def _say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._began:4.0f} s] {text}", flush=True)


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    effort = QUICK if args.quick else FULL
    workloads = traces(args.azure, args.mooncake)
    model = args.model or (DEFAULT_MODEL if args.quick else make_model(folder / "m88"))
    bench = Bench(model, folder, effort.profile_s)
    with bench.fleet() as url:
        before = profiled(bench, url)
        replays = Replays(url, before, effort)
        replayed = [replays.of(trace) for trace in workloads]
        after = profiled(bench, url)
    return [row for one in replayed for row in one.beside([before, after])]


def profiled(bench: Bench, url: str) -> Profile:
    print(f"profiling {bench.model.name}, then asking the fleet", flush=True)
    profile = bench.profile(url)
    print(bare(profile.latency), flush=True)
    return profile


def figures(rows: list[Row]) -> dict[str, float]:
    names = ("ttft_p50", "ttft_p90", "tpot_p50", "tpot_p90", "goodput", "throughput")
    found = {f"{name}_err": round(worst(rows, name), 4) for name in names}
    judged = [row for row in rows if row.name in names[:5]]
    return {
        **found,
        "largest_spread": round(max(row.spread for row in judged), 4),
        "largest_drift": round(max(row.drift for row in judged), 4),
        "within": sum(row.within for row in judged),
        "judged": len(judged),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="the bundled model, one short run per workload")
    add("--model", type=Path, help="folder (a random one of 88 M parameters, made for this)")
    add("--azure", type=Path, default=SAMPLES / "azure.csv", help="trace (the sample)")
    add("--mooncake", type=Path, default=SAMPLES / "mooncake.jsonl", help="trace (the sample)")
    add("--recorded", action="store_true", help=f"the traces in {RECORDED}, where they are")
    args = parser.parse_args()
    if args.recorded:
        args.azure = recorded("azure_2023_conv.csv", args.azure)
        args.mooncake = recorded("mooncake_conversation.jsonl", args.mooncake)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that `finally` runs
    quiet = is_quiet()
    with tempfile.TemporaryDirectory(prefix="baton-validate-") as folder:
        rows = measure(args, Path(folder))
    print("\n" + table(rows))
    print(json.dumps({**figures(rows), "quiet": quiet}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
