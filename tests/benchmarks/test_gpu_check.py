"""The check of a GPU keeps its time, ends what it started and writes down how far it came."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/gpu_check.py"
CHILD = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("begun", flush=True)
time.sleep(600)
"""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    spec.loader.exec_module(module)
    return module


def test_a_part_that_hangs_is_ended_with_its_children_and_told(
    gpu_check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid_file = tmp_path / "pid"
    stage = (
        gpu_check.Part("hangs", ("-c", CHILD, str(pid_file)), 5.0),
        gpu_check.Part("works", ("-c", "print('{}')"), 60.0),
        gpu_check.Part("fails", ("-c", "raise SystemExit('a reason')"), 60.0),
    )
    found = {o.name: o for o in gpu_check.run_stage(stage, tmp_path, dict(os.environ))}
    assert {name: o.passed for name, o in found.items()} == {
        "hangs": False,
        "works": True,
        "fails": False,
    }
    assert "begun\n\nended after 5 s" in (tmp_path / "hangs.log").read_text()
    assert "a reason" in capsys.readouterr().out
    deadline = time.monotonic() + 30
    while is_alive(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """A process that has ended may wait for whoever takes it over."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_all_parts_together_stay_below_eight_minutes(gpu_check: ModuleType) -> None:
    longest = sum(max(part.limit_s for part in stage) for stage in gpu_check.STAGES)
    assert longest <= 440, "and the rest for starting and unpacking"
    names = [part.name for stage in gpu_check.STAGES for part in stage]
    assert len(set(names)) == len(names), "each has a log of its own"


def test_what_is_missing_is_named(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.missing_packages([]) == []
    monkeypatch.setattr(gpu_check.metadata, "distributions", lambda path: iter(()))
    assert {"torch", "pyzmq", "pytest"} <= set(gpu_check.missing_packages([]))
