"""Everything that needs a GPU, in one go: tests and benchmarks, their results into a folder.

    python scripts/gpu_check.py results

Needs torch, triton and transformers. What else Baton needs may lie as wheels in a folder that is
named with --wheels; they are unpacked beside the results' processes, and nothing is installed. Each
part has a time limit, and all together stay below eight minutes. In the folder:

    summary.json       what ran, how it ended, the benchmark's figures
    NAME.log           what each part printed
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TAIL = 3000  # characters of a failed part's log that are shown


@dataclass(frozen=True, slots=True)
class Part:
    """One process and its limit."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float


PYTEST = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider")
PARTS = (
    Part("engine", (*PYTEST, "tests/gpu"), 120),
    Part("bench_gpu", ("-m", "benchmarks.bench_gpu"), 150),
    Part("kernels", (*PYTEST, "tests/kernels", "-k", "triton and not compiles"), 150),
    Part("bench_engine", ("-m", "baton", "bench", "engine", "--device", "cuda:0", "--json"), 40),
)
TOY_PARTS = (Part("bench_gpu", ("-m", "benchmarks.bench_gpu", "--tiny", "--device", "cpu"), 120),)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended."""

    name: str
    passed: bool
    seconds: float
    last_line: str


def run_part(part: Part, folder: Path, environment: dict[str, str]) -> Outcome:
    """Run it within its limit; its output goes to a file of the folder."""
    log, began = folder / f"{part.name}.log", time.monotonic()
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                [sys.executable, *part.arguments],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=part.limit_s,
            )
            code = done.returncode
        except subprocess.TimeoutExpired:
            stream.write(f"\nended after {part.limit_s:.0f} s\n")
            code = -1
    text = log.read_text(errors="replace")
    if code:
        print(text[-TAIL:])
    lines = text.strip().splitlines() or [""]
    return Outcome(part.name, code == 0, round(time.monotonic() - began, 1), lines[-1])


def figures_of(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The benchmark's last line, where it came to one."""
    for outcome in outcomes:
        if outcome.name == "bench_gpu" and outcome.last_line.startswith("{"):
            found: dict[str, Any] = json.loads(outcome.last_line)
            return found
    return {}


def unpack(wheels: Path | None, target: str) -> dict[str, str]:
    """The environment of the parts; wheels become importable in it."""
    environment = dict(os.environ)
    paths = [str(ROOT)]
    if wheels is not None:
        found = sorted(str(path) for path in wheels.glob("*.whl"))
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        subprocess.run([*command, "--target", target, *found], check=True)
        paths.append(target)
    if given := environment.get("PYTHONPATH"):
        paths.append(given)
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where results go")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="packages that are not there")
    parser.add_argument("--toy", action="store_true", help="without a GPU: see that this runs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.toy and not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        print("gpu_check: there is no NVIDIA device here; nothing was checked", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="baton-gpu-") as target:
        environment = unpack(args.wheels, target)
        outcomes = []
        for part in TOY_PARTS if args.toy else PARTS:
            outcomes.append(run_part(part, args.folder, environment))
            done = outcomes[-1]
            print(f"{done.name:14} {'passed' if done.passed else 'FAILED'} in {done.seconds} s")
    summary = {"parts": [asdict(o) for o in outcomes], "figures": figures_of(outcomes)}
    (args.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["figures"]))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
