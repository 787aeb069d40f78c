"""`baton bench engine` on the bundled model: tables, JSON, and a trace that a viewer reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from baton import cli

SIZES = ("--batch", "1", "2", "--context", "20", "--prompt", "16", "--steps", "3")
SMALL = ("bench", "engine", *SIZES)


def test_tables_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    assert cli.main([*SMALL, "--profile", "--trace", str(trace)]) == 0
    shown = capsys.readouterr().out
    for text in ("decode 1", "decode 2", "prefill 16", "tokens/s", "schedule", "attention", "glue"):
        assert text in shown
    events = json.loads(trace.read_text())["traceEvents"]
    assert [e["args"]["name"] for e in events if e["ph"] == "M"] == [
        *("decode 1", "decode 2", "prefill 16"),
    ]
    complete = [e for e in events if e["ph"] == "X"]
    assert {"forward", "sample", "linears"} <= {e["name"] for e in complete}
    assert all(e["dur"] >= 0 and {"ts", "pid", "tid"} <= set(e) for e in complete)


def test_json_without_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--json", "--temperature", "1", "--no-fusing"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [len(case["ms"]) for case in found["cases"]] == [3, 3, 2]
    assert "parts_ms" not in found["cases"][0]


def test_a_context_that_the_model_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "engine", "--context", "1000000"]) == 1
    assert "comes to 1000022 tokens" in capsys.readouterr().err


def test_the_other_bench_is_still_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert "--num-requests" in shown
    assert "baton bench engine" in shown
