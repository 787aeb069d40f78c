"""`make validate-simulator`: three workloads on real nodes and in the simulator, side by side.

One prefill and one decode node of one thread each serve a model, which is profiled with this fleet.
Then in rounds each workload runs once for real, at a rate at which the busiest node computes half
of the time. A machine is not always as fast: before and after each run the fleet is asked for its
pace (`baton.profile_load`) by random requests of another kind, and the workload is simulated at
either pace. So what is real and what is simulated are means over the same minutes:

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
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from statistics import mean

from baton.bundled_model import DEFAULT_MODEL
from baton.profile_load import under_load
from baton.simulation.setup import Split
from baton.simulation.simulate import simulate
from baton.simulation.utilisation import at_utilisation
from benchmarks.make_model import make_model
from benchmarks.planning.figures import Figures, Row, compare, figures_of, table, worst
from benchmarks.planning.real import (
    CHUNK,
    MAX_MODEL_LEN,
    Bench,
    bare,
    drawn,
    setup_of,
    unloaded,
)
from benchmarks.quiet import is_quiet
from benchmarks.serve.processes import ROOT
from tuner.goodput import Slo
from tuner.profile import Profile
from tuner.replay import replay
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

    rounds: int
    seconds: float  # per workload and round
    profile_s: float
    pace_s: float  # to ask for the fleet's pace


FULL = Effort(3, 25.0, 45.0, 20.0)
QUICK = Effort(1, 8.0, 10.0, 8.0)


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
class Load:
    """A workload at its rate, and what its real runs were like so far."""

    trace: Trace
    busiest: float  # share of the time that the busiest simulated node computes
    slo: Slo
    real: list[Figures] = field(default_factory=list)
    paces: list[Profile] = field(default_factory=list)  # beside the real runs

    def describe(self) -> str:
        return (
            f"{self.trace.name}: {len(self.trace.requests)} requests, {self.trace.rate:.2f} per "
            f"second, busiest node {self.busiest:.0%}; limits {self.slo.ttft_s * 1e3:.0f} ms TTFT, "
            f"{self.slo.tpot_s * 1e3:.1f} ms TPOT"
        )

    def run(self, url: str, seed: int) -> None:
        self.real.append(figures_of(replay(url, self.trace, seed), self.slo))

    def rows(self) -> list[Row]:
        simulated = [
            figures_of(simulate(setup_of(profile, SPLIT), self.trace).records, self.slo)
            for profile in self.paces
        ]
        return compare(self.trace.name, self.real, simulated)


def load_of(whole: Trace, profile: Profile, seconds: float) -> Load:
    """The profile only says how many requests are half a load."""
    setup = setup_of(profile, SPLIT)
    trace, _ = at_utilisation(setup, whole, UTILISATION)
    trace, busiest = at_utilisation(setup, shortened(trace, seconds), UTILISATION)
    return Load(trace, busiest, unloaded(setup, trace))


def measure(args: argparse.Namespace, folder: Path) -> list[Row]:
    effort = QUICK if args.quick else FULL
    workloads = traces(args.azure, args.mooncake)
    model = args.model or (DEFAULT_MODEL if args.quick else make_model(folder / "m88"))
    bench = Bench(model, folder, effort.profile_s)
    seeds = count(101)
    with bench.fleet() as url:
        profile = profiled(bench, url)
        loads = [load_of(trace, profile, effort.seconds) for trace in workloads]
        for load in loads:
            print(load.describe(), flush=True)
        before = paced(profile, url, effort.pace_s, next(seeds))
        for number in range(effort.rounds):
            for load in loads:
                print(f"round {number + 1} of {effort.rounds}: {load.trace.name}", flush=True)
                load.run(url, next(seeds))
                after = paced(profile, url, effort.pace_s, next(seeds))
                load.paces.extend((before, after))
                before = after
    return [row for load in loads for row in load.rows()]


def paced(profile: Profile, url: str, seconds: float, seed: int) -> Profile:
    """The profile as the fleet is now."""
    over = under_load(profile, url, CHUNK, seconds, seed, tell=lambda _: None)
    print(f"pace: prefill {over.prefill_factor:.2f}, decode {over.decode_factor:.2f}", flush=True)
    return replace(profile, overheads=over)


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
    add("--quick", action="store_true", help="the bundled model, one short round")
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
