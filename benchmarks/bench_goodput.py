"""`make bench-goodput`: what planning, tuning and switching roles bring; the last line is JSON.

role_switch_s                     real nodes under load: from a node's last moved request to its
                                  return in the other role; the longest of several switches
role_switch_failed                requests of that load that failed
tuner_vs_best_static_worst_phase  simulated with a profile measured in this run: good requests
tuner_vs_best_static_overall      with the tuner beside the best of all static splits
tuner_vs_known                    beside moves by who knows beforehand when the work changes
planned_vs_colocated              real nodes, two of one thread each, the 88 M random model: goodput
                                  of the planner's choice beside two colocated nodes as they come
planned_vs_best_colocated         the same beside the better of these and the colocated ones with
                                  the token budget that the simulator likes best
..._simulated                     what the simulator predicted for these two, before they were
                                  measured
`benchmarks/planning/beside.py` says which load that is, and what its limits are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from baton.bundled_model import DEFAULT_MODEL
from baton.simulation.planner import Candidate
from baton.simulation.setup import Split
from benchmarks.make_model import make_model
from benchmarks.planning.beside import (
    Measured,
    alone,
    chosen_fleets,
    limits_from,
    measured_goodput,
    ratio,
)
from benchmarks.planning.real import CHUNK, Bench, bare, drawn, setup_of
from benchmarks.planning.switching import switch_under_load
from benchmarks.planning.tuning import tuned_beside_static
from benchmarks.quiet import is_quiet
from tuner.replay import bench_run, replay
from tuner.workload import Span

BUDGETS = (32, 64, 128, 256, CHUNK, 1024, 2048)
PARTS = ("planned", "tuner", "switching")
Value = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured of the planner's choice."""

    profile_s: float
    num_alone: tuple[int, int]  # chats, long prompts
    num_simulated: int
    run_s: float


FULL = Effort(15.0, (8, 4), 300, 30.0)
QUICK = Effort(6.0, (3, 2), 60, 8.0)


def tell(text: str) -> None:
    print(text, flush=True)


def switching(bench: Bench, *, quick: bool) -> dict[str, Value]:
    """One decode node of two goes to and fro while streams run."""
    number, switches = (12, 2) if quick else (60, 6)
    load = drawn("switched", number, Span(32, 96), Span(32, 96), seed=3, rate=number / 25)
    with bench.fleet("--prefill", "1", "--decode", "2") as url:
        run = bench_run(url, load, seed=5)
        done = asyncio.run(switch_under_load(url, run, switches, 20 / switches))
    tell(f"role switches: {', '.join(f'{s:.2f}' for s in done.return_s)} s")
    tell(f"  {done.num_failed} of {done.num_requests} requests failed")
    return {"role_switch_s": max(done.return_s), "role_switch_failed": done.num_failed}


def planned(bench: Bench, effort: Effort) -> dict[str, Value]:
    """Long prompts among short chats on two nodes: the planner's choice beside colocated ones."""
    with bench.fleet() as url:
        tell(f"profiling {bench.model.name}, then asking the fleet")
        setup = setup_of(bench.profile(url), Split(prefill=1, decode=1))
    tell(bare(setup.model))
    with bench.fleet("--mixed", "2") as url:
        replay(url, alone(2, 1, 2.0, 4.0), 800)
        limits = limits_from(replay(url, alone(*effort.num_alone, 2.0, 4.0), 801))
    for kind, slo in limits.items():
        tell(f"limits of a {kind}: {slo.ttft_s * 1e3:.0f} ms TTFT, {slo.tpot_s * 1e3:.1f} ms TPOT")
    plan, candidates = chosen_fleets(
        setup, limits, BUDGETS, CHUNK, effort.num_simulated, lambda line: tell(f"  {line}")
    )
    tell(f"planned: {plan.best}; baton serve MODEL {plan.best.flags}")

    def fleets(candidate: Candidate) -> AbstractContextManager[str]:
        flags = [*candidate.flags.split(), "--handoff", "auto"]
        return bench.fleet(*flags)

    measured = measured_goodput(candidates, limits, fleets, effort.run_s, tell)
    for name, one in measured.items():
        tell(f"{name}: {one.goodput:.2f} requests per second, predicted {one.first_rate:.2f}")
    return _ratios(candidates, measured)


def _ratios(candidates: dict[str, Candidate], measured: dict[str, Measured]) -> dict[str, Value]:
    real = {name: one.goodput for name, one in measured.items()}
    simulated = {name: one.rate for name, one in candidates.items()}
    found: dict[str, Value] = {}
    for suffix, rates in (("", real), ("_simulated", simulated)):
        best = max(rates["colocated"], rates["tuned"])
        found[f"planned_vs_colocated{suffix}"] = ratio(rates["planned"], rates["colocated"])
        found[f"planned_vs_best_colocated{suffix}"] = ratio(rates["planned"], best)
    told: dict[str, Value] = {f"goodput_{name}": round(rate, 3) for name, rate in real.items()}
    return found | told | {"planned": str(candidates["planned"])}


def tuned(bench: Bench, *, quick: bool) -> dict[str, Value]:
    """The online tuner beside static splits, simulated with a profile of this run."""
    with bench.fleet() as url:
        tell(f"profiling {bench.model.name}, then asking the fleet")
        setup = setup_of(bench.profile(url), Split(prefill=1, decode=1))
    sampled, phase_s = (60, 40.0) if quick else (200, 100.0)
    found = tuned_beside_static(setup, sampled, phase_s, tell)
    return {
        "tuner_vs_best_static_worst_phase": round(found.worst_phase, 3),
        "tuner_vs_best_static_overall": round(found.overall, 3),
        "tuner_vs_known": round(found.known, 3),
        "tuner": "simulated",
    }


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Value]:
    found: dict[str, Value] = {}
    bench = Bench(args.model, folder, 10.0 if args.quick else 45.0)
    if "planned" in args.only:
        effort = QUICK if args.quick else FULL
        model = args.planned_model or make_model(folder / "m88")
        found |= planned(Bench(model, folder, effort.profile_s), effort)
    if "tuner" in args.only:
        found |= tuned(bench, quick=args.quick)
    if "switching" in args.only:
        found |= switching(bench, quick=args.quick)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="shorter loads")
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (all)")
    add(
        "--model",
        type=Path,
        default=DEFAULT_MODEL,
        help="folder, for the tuner and the switches (the bundled)",
    )
    add("--planned-model", type=Path, help="folder, for planned (88 M parameters, made for this)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that `finally` runs
    quiet = is_quiet()
    with tempfile.TemporaryDirectory(prefix="baton-goodput-") as folder:
        figures = measure(args, Path(folder))
    print(json.dumps({**figures, "quiet": quiet}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
