"""Everything that needs a GPU, in one go: tests and benchmarks, their results into a folder.

    python scripts/gpu_check.py results

Needs torch, triton, transformers, pytest and a C compiler for Triton. What else Baton needs
may lie as wheels in a folder that is named with --wheels; they are unpacked beside the results'
processes, and nothing is installed. Tests run beside one another, benchmarks alone. Each part has a
time limit, and all together stay below eight minutes. In the folder, up to date after each part:

    summary.json       the machine, what ran, how it ended, the benchmark's figures
    NAME.log           what each part printed
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
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


PYTEST = ("-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations=5")
TESTS = (
    Part("engine", (*PYTEST, "tests/gpu"), 170),
    Part("attention", (*PYTEST, "tests/kernels/test_triton_attention.py"), 170),
    Part(
        "kernels",
        (*PYTEST, "tests/kernels", "-k", "triton and not compiles and not test_triton_attention"),
        170,
    ),
)
BENCHMARKS = (
    Part("bench_gpu", ("-m", "benchmarks.bench_gpu"), 200),
    Part("bench_engine", ("-m", "baton", "bench", "engine", "--device", "cuda:0", "--json"), 60),
)
TOY = Part("bench_gpu", ("-m", "benchmarks.bench_gpu", "--tiny", "--device", "cpu"), 120)
STAGES: tuple[tuple[Part, ...], ...] = (TESTS, *((part,) for part in BENCHMARKS))
"""Parts of a stage run at the same time: most of a test is compiled, on the host."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended."""

    name: str
    passed: bool
    seconds: float
    last_line: str


class Running:
    """A part's process, whose output goes to a file of the folder."""

    def __init__(self, part: Part, folder: Path, environment: dict[str, str]) -> None:
        self._part, self._log = part, folder / f"{part.name}.log"
        self._began = time.monotonic()
        with self._log.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, *part.arguments],
                cwd=ROOT,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its own children can be ended, too
            )

    def wait(self) -> Outcome:
        """Until it has ended or its time is over."""
        left = self._began + self._part.limit_s - time.monotonic()
        try:
            code = self._process.wait(timeout=max(0.0, left))
        except subprocess.TimeoutExpired:
            self.stop()
            code = -1
            with self._log.open("a") as stream:
                stream.write(f"\nended after {self._part.limit_s:.0f} s\n")
        took = round(time.monotonic() - self._began, 1)
        text = self._log.read_text(errors="replace")
        if code:
            print(f"---- {self._part.name}\n{text[-TAIL:]}", flush=True)
        lines = text.strip().splitlines() or [""]
        return Outcome(self._part.name, code == 0, took, lines[-1])

    def stop(self) -> None:
        """End it and what it started; it may have ended."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run_stage(
    stage: Sequence[Part], folder: Path, environment: dict[str, str]
) -> Iterator[Outcome]:
    """Each part's outcome."""
    running = [Running(part, folder, environment) for part in stage]
    try:
        for each in running:
            done = each.wait()
            print(
                f"{done.name:14} {'passed' if done.passed else 'FAILED'} in {done.seconds} s",
                flush=True,
            )
            yield done
    finally:
        for each in running:
            each.stop()


def missing_packages(folders: Sequence[str]) -> list[str]:
    """Of what Baton and its tests need, what is neither installed nor in these folders."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], "pytest", "pytest-timeout"]
    there = metadata.distributions(path=[*folders, *sys.path])
    names = {re.sub(r"[-_.]+", "-", each.name).lower() for each in there}
    wanted = [re.split(r"[^\w.-]", each.partition(";")[0].strip())[0].lower() for each in needed]
    return sorted(set(wanted) - names)


def machine(folders: Sequence[str]) -> dict[str, str]:
    """What the results depend on."""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    found = {"python": platform.python_version(), "compiler": compiler or "none: Triton needs one"}
    for name in ("torch", "triton", "transformers"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if missing := missing_packages(folders):
        found["missing"] = ",".join(missing)
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
        found["gpu"] = told.stdout.strip()
    return found


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
        command += ["--no-compile"]
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
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="baton-gpu-") as target:
        environment = unpack(args.wheels, target)
        found = machine([target])
        print(" ".join(f"{name}={value}" for name, value in found.items()), flush=True)
        for stage in ((TOY,),) if args.toy else STAGES:
            for outcome in run_stage(stage, args.folder, environment):
                outcomes.append(outcome)
                write_summary(args.folder, found, outcomes)
    print(json.dumps(figures_of(outcomes)))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def write_summary(folder: Path, found: dict[str, str], outcomes: Sequence[Outcome]) -> None:
    """What is known so far."""
    summary = {
        "machine": found,
        "parts": [asdict(outcome) for outcome in outcomes],
        "figures": figures_of(outcomes),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
