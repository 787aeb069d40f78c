"""The workloads of `make validate-simulator`: scaled, never too few, recorded where wanted."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from benchmarks import validate_simulator
from benchmarks.validate_simulator import (
    LEAST,
    MEAN_INPUT,
    MOST,
    SAMPLES,
    recorded,
    shortened,
    traces,
)
from tuner.trace import Trace, TracedRequest


def test_the_samples_are_scaled_to_the_machine() -> None:
    chats, azure, mooncake = traces(SAMPLES / "azure.csv", SAMPLES / "mooncake.jsonl")
    for trace in (chats, azure, mooncake):
        assert mean(r.input_len for r in trace.requests) == pytest.approx(MEAN_INPUT, rel=0.1)
        assert len(trace.requests) <= MOST
    assert mooncake.block_len > 0


def test_a_lull_at_the_beginning_does_not_leave_a_run_without_requests() -> None:
    trace = Trace("slow", tuple(TracedRequest(10.0 * i, 5, 5) for i in range(100)))
    assert len(shortened(trace, 25.0).requests) == LEAST
    assert len(shortened(trace, 500.0).requests) == 51


def test_recorded_traces_are_taken_where_they_are_and_else_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate_simulator, "RECORDED", tmp_path)
    sample = SAMPLES / "azure.csv"
    assert recorded("a.csv", sample) == sample
    assert "no recorded trace at" in capsys.readouterr().out
    (tmp_path / "a.csv").write_text(sample.read_text())
    assert recorded("a.csv", sample) == tmp_path / "a.csv"
    assert capsys.readouterr().out == ""
