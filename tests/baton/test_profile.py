"""`baton profile` on the bundled model: enough samples for every formula, and a file that loads."""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from baton.cli import main
from baton.profiler import Profiler, stopwatch_for
from engine.loader import load_model
from tuner.latency import StepWork
from tuner.profile import load_profile
from tuner.quiet import NOISY


def test_a_short_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    flags = ["--seconds", "4", "--max-model-len", "256", "--link-gbit-s", "1"]
    assert main(["profile", "-o", str(path), *flags]) == 0
    told = capsys.readouterr().out
    assert all(f"{name} " in told for name in ("prefill", "decode", "transfer"))
    profile = load_profile(path)
    assert profile.max_model_len == 256
    assert all(error.num_samples >= 4 for error in profile.errors.values())
    assert profile.latency.step_s(StepWork(prefill_tokens=64, prefill_squares=4096)) > 0
    assert profile.latency.step_s(StepWork(decode_batch=4, decode_context=400)) > 0
    assert profile.latency.transfer_s(10**9) > 8.0  # of the link alone
    assert sorted(profile.spread) == ["engine", "processor elsewhere"]
    noisy = max(profile.spread.values()) > NOISY
    assert ("profile again on a quiet machine" in told) == noisy


def test_every_context_is_measured_however_short_the_time() -> None:
    """From one of them nobody could tell what reading a context takes."""
    loaded = load_model(DEFAULT_MODEL, dtype="float32", max_model_len=512)
    ticks = count()
    profiler = Profiler(loaded, loaded.kv_layout(16), time.perf_counter, lambda: next(ticks))
    samples = profiler.decodes(12.0)
    each = {round(context / batch) for _, context, batch in (s.variables for s in samples)}
    assert min(each) < 64
    assert max(each) > 256
    assert len(samples) < 8, "batches stop to grow when the time is over"


def test_one_thread_of_a_processor_is_timed_by_what_it_computes() -> None:
    """So that nothing else that runs there is in the profile."""
    watch = stopwatch_for("cpu", 1)
    start = watch()
    time.sleep(0.3)
    assert watch() - start < 0.2
    assert stopwatch_for("cpu", 2) is stopwatch_for("cuda", 1) is time.perf_counter


def test_a_context_in_which_nothing_can_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "-o", str(tmp_path / "p.json"), "--max-model-len", "100"]) == 1
    assert "too few to profile: it takes 204" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-o", "/absent/profile.json"], "there is no folder /absent"),
        (["-o", "/"], "it is a folder"),
        (["-o", "p.json", "--threads", "0"], "--threads: must be at least 1"),
        (["-o", "p.json", "--seconds", "0"], "--seconds: must be above 0"),
    ],
)
def test_what_could_not_end_well_is_refused_before_anything_is_measured(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("baton.profile.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit):  # by argparse, or as the entry point does
        sys.exit(main(["profile", *flags]))
    assert told in capsys.readouterr().err.splitlines()[-1]
