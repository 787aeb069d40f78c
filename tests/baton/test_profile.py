"""`baton profile` on the bundled model: enough samples for every formula, and a file that loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cli import main
from tuner.latency import StepWork
from tuner.profile import load_profile


def test_a_short_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    flags = ["--seconds", "1", "--max-model-len", "256", "--link-gbit-s", "1"]
    assert main(["profile", "-o", str(path), *flags]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} " in told for name in ("prefill", "decode", "transfer"))
    profile = load_profile(path)
    assert profile.max_model_len == 256
    assert all(error.num_samples >= 4 for error in profile.errors.values())
    assert profile.latency.step_s(StepWork(prefill_tokens=64, prefill_squares=4096)) > 0
    assert profile.latency.step_s(StepWork(decode_batch=4, decode_context=400)) > 0
    assert profile.latency.transfer_s(10**9) > 8.0  # of the link alone
