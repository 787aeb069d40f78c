"""`make bench-serve`: start-up, handoff, router and memory, on real processes on loopback.

The parts are in `benchmarks/serve/`. The last line of the output is one JSON object.
Run it on an idle machine: a busy neighbour shows in every figure.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.serve.fleet import (
    KV_POOL_BYTES,
    first_to_second,
    measure_one_start,
    node_overheads_mb,
    serving,
)
from benchmarks.serve.processes import ROOT
from benchmarks.serve.router_load import measure_router

Figures = dict[str, float]


def measure_start(folder: Path, quick: bool) -> Figures:
    """Time to the first token of the bundled model."""
    starts = [measure_one_start(folder) for _ in range(1 if quick else 3)]
    for start in starts:
        print(
            f"start     ready after {start.ready_s:.1f} s, first token after {start.token_s:.1f} s"
        )
    return {"start_s": round(statistics.median(start.token_s for start in starts), 2)}


def measure_fleet(folder: Path, quick: bool) -> Figures:
    """Second token and memory on one prefill and one decode node with the 88 M random model."""
    model = folder / "m88"
    make_random_model(model)
    weight_bytes = (model / "model.safetensors").stat().st_size
    flags: list[str | Path] = [model, "--kv-memory", str(KV_POOL_BYTES), "--handoff", "always"]
    with serving(folder, flags) as (process, url):
        overheads = node_overheads_mb(process.pid, weight_bytes)
        handoff = first_to_second(url, 3 if quick else 9)
    for node, overhead in overheads.items():
        print(f"memory    {node}: {overhead:.0f} MB private beyond the weights")
    print(
        f"handoff   second token after {handoff.second_ms:.1f} ms = {handoff.steps:.2f} steps "
        f"of {handoff.step_ms:.1f} ms"
    )
    return {
        "first_to_second_token_steps": round(handoff.steps, 2),
        "node_overhead_mb": round(max(overheads.values()), 1),
    }


def make_random_model(folder: Path) -> None:
    """In a process of its own: torch's memory must not stay in this one."""
    command = [sys.executable, str(ROOT / "benchmarks" / "make_model.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stderr}")


PARTS: dict[str, Callable[[Path, bool], Figures]] = {
    "start": measure_start,
    "fleet": measure_fleet,
    "router": measure_router,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller load")
    parser.add_argument(
        "--only", action="append", choices=list(PARTS), help="measure this part (may be repeated)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that `finally` runs
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        for name in args.only or PARTS:
            figures |= PARTS[name](Path(folder), args.quick)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
