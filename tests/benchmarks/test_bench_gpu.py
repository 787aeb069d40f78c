"""The GPU's benchmark runs end to end on a toy; its figures mean something on a GPU alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_gpu

GOALS = {
    "decode_b1_vs_roofline",
    "decode_b16_vs_roofline",
    "decode_b64_vs_roofline",
    "paged_decode_bw",
    "prefill8k_mfu",
    "gather_scatter_bw",
}
FIGURES = GOALS | {"handoff_staging_gb_s", "handoff_cuda_ipc_gb_s"}


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", *flags])
    return bench_gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 1
    said = capsys.readouterr()
    assert said.err == "bench_gpu: torch finds no CUDA device here; nothing was measured\n"
    assert not said.out


def test_a_whole_model_is_not_run_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--device", "cpu") == 1
    assert "takes --tiny" in capsys.readouterr().err


def test_the_benchmark_measures_every_figure_and_the_check_writes_it_down(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts/gpu_check.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), "--toy"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [part["name"] for part in summary["parts"]] == ["bench_gpu"]
    assert summary["parts"][0]["passed"] is True
    figures = summary["figures"]
    assert figures.keys() >= FIGURES
    assert all(figures[name] > 0 and math.isfinite(figures[name]) for name in FIGURES)
    assert figures["tiny"] is True
    assert json.loads(done.stdout.splitlines()[-1]) == summary["figures"]
    assert (tmp_path / "out" / "bench_gpu.log").stat().st_size


def test_a_goal_that_is_not_reached_is_named() -> None:
    figures = bench_gpu.AT_MOST | bench_gpu.AT_LEAST
    assert figures.keys() == GOALS
    assert bench_gpu.missed(figures) == []
    slow = figures | {"decode_b16_vs_roofline": 1.26, "prefill8k_mfu": math.nan}
    assert bench_gpu.missed(slow) == ["decode_b16_vs_roofline", "prefill8k_mfu"]
