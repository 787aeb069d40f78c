"""The GPU's benchmark runs end to end on a toy; its figures mean something on a GPU alone."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from benchmarks import bench_gpu

FIGURES = {
    "decode_b1_vs_roofline",
    "decode_b16_vs_roofline",
    "decode_b64_vs_roofline",
    "paged_decode_bw",
    "prefill8k_mfu",
    "gather_scatter_bw",
}


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_gpu", *flags])
    return bench_gpu.main()


def test_every_figure_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--tiny", "--device", "cpu") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() >= FIGURES
    assert all(found[name] > 0 and math.isfinite(found[name]) for name in FIGURES)
    assert found["tiny"] is True


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
