"""`make bench-goodput`: what planning, tuning and switching roles bring; the last line is JSON.

role_switch_s                     real nodes under load: from a node's last moved request to its
                                  return in the other role; the longest of several switches
role_switch_failed                requests of that load that failed
tuner_vs_best_static_worst_phase  simulated with a profile measured in this run: good requests
tuner_vs_best_static_overall      with the tuner beside the best of all static splits
tuner_vs_known                    beside moves by who knows beforehand when the work changes
planned_vs_colocated              on real nodes: null, as no node can serve both phases yet;
planned_vs_best_colocated         the same, beside every token budget
..._simulated                     these two from the simulator: no replacement for a measurement
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from pathlib import Path

from baton.bundled_model import DEFAULT_MODEL
from baton.simulation.planner import Planner
from baton.simulation.setup import Setup, Split
from benchmarks.planning.real import CHUNK, Bench, bench_run, drawn, merged, setup_of, unloaded
from benchmarks.planning.switching import switch_under_load
from benchmarks.planning.tuning import tuned_beside_static
from benchmarks.quiet import is_quiet
from tuner.trace import Trace
from tuner.workload import Span

BUDGETS = (128, 256, CHUNK, 1024)
SHARE = 0.9
LONG_SHARE = 0.1
Value = float | int | bool | str | None


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


def planned(setup: Setup, number: int) -> dict[str, Value]:
    """Long prompts among short chats on two nodes: the planner's choice beside colocated ones."""
    trace = mixed_load(number)
    slo = unloaded(setup, trace)
    plan = Planner(setup, trace, slo, SHARE, tell).plan(2, BUDGETS)
    together = {c.token_budget: c.rate for c in plan.candidates if c.split.mixed}
    tell(f"planned, in the simulator: {plan.best}")
    default, best = together[CHUNK], max(together.values())
    return {
        "planned_vs_colocated_simulated": round(plan.best.rate / default, 3) if default else None,
        "planned_vs_best_colocated_simulated": round(plan.best.rate / best, 3) if best else None,
    }


def mixed_load(number: int) -> Trace:
    num_long = max(2, int(number * LONG_SHARE))
    chats = drawn("chats", number - num_long, Span(16, 128), Span(32, 96), seed=1)
    prompts = drawn("long", num_long, Span(800, 1500), Span(8, 32), seed=2, rate=LONG_SHARE)
    return merged("mixed", [chats, prompts])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Value]:
    bench = Bench(args.model, folder, 10.0 if args.quick else 45.0)
    with bench.fleet() as url:
        tell(f"profiling {args.model.name}, then asking the fleet")
        setup = setup_of(bench.profile(url), Split(prefill=1, decode=1))
    found: dict[str, Value] = {
        "planned_vs_colocated": None,
        "planned_vs_best_colocated": None,
        "why_null": "no real node serves both phases yet; see the simulated ones",
    }
    found |= planned(setup, 40 if args.quick else 120)
    sampled, phase_s = (60, 40.0) if args.quick else (200, 100.0)
    tuned = tuned_beside_static(setup, sampled, phase_s, tell)
    found |= {
        "tuner_vs_best_static_worst_phase": round(tuned.worst_phase, 3),
        "tuner_vs_best_static_overall": round(tuned.overall, 3),
        "tuner_vs_known": round(tuned.known, 3),
        "tuner": "simulated",
    }
    return found | switching(bench, quick=args.quick)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="shorter loads")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder (the bundled)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that `finally` runs
    quiet = is_quiet()
    with tempfile.TemporaryDirectory(prefix="baton-goodput-") as folder:
        figures = measure(args, Path(folder))
    print(json.dumps({**figures, "quiet": quiet}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
