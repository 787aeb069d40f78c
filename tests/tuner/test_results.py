"""What a run leaves behind: replayed traces, sweeps, phases, the fleet, and the pictures of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.bench import main
from tests.tuner.conftest import FakeServer
from tuner.goodput import Slo
from tuner.html_report import html_report
from tuner.record import RequestRecord, server_phases
from tuner.results import mean_phases, read_results, result_json
from wire.errors import ConfigError

FLEET = {
    "waiting": 2,
    "nodes": [
        {
            "name": "decode-0",
            "role": "decode",
            "load": {
                "blocks_total": 100,
                "blocks_free": 75,
                "num_running": 3,
                "num_waiting": 1,
                "queued_tokens": 9,
            },
        }
    ],
}
PHASES = "read;dur=0.5, prefill;dur=2.5, ttft;dur=3.0, handoff;dur=7"


def bench(server: FakeServer, *flags: str) -> int:
    return main(["--url", server.url, *flags])


def run_json(server: FakeServer, path: Path, *flags: str) -> Any:
    assert bench(server, "--json", str(path), *flags) == 0
    return json.loads(path.read_text())


def record(start: float, ttft: float, tpot: float, error: str | None = None) -> RequestRecord:
    times = (start + ttft, start + ttft + 10 * tpot)
    return RequestRecord(0, start, start, times[1], times, 5, 11, error, phases={"prefill": ttft})


# ---------------------------------------------------------------- traces


def test_a_trace_is_replayed_with_its_prefixes_at_its_times(
    server: FakeServer, tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    rows = [(0, 3, [7]), (100, 5, [7, 8]), (250, 4, [9])]
    lines = [
        json.dumps({"timestamp": ms, "input_length": 512 * n, "output_length": 2, "hash_ids": ids})
        for ms, n, ids in rows
    ]
    trace.write_text("\n".join([*lines[:2], "nonsense", lines[2]]))
    told = run_json(
        server, tmp_path / "r.json", "--trace", str(trace), "--length-scale", "0.015625"
    )
    assert told["num_completed"] == 3
    assert [row["due_s"] for row in told["samples"]] == pytest.approx([0, 0.1, 0.25], abs=0.05)
    prompts = [body["prompt"] for body in server.bodies]
    assert [len(prompt) for prompt in prompts] == [24, 40, 32]
    assert prompts[0][:8] == prompts[1][:8] != prompts[2][:8]
    assert [body["max_tokens"] for body in server.bodies] == [1, 1, 1]
    assert told["settings"]["trace"] == {"name": "t.jsonl", "requests": 3}


def test_a_rate_replaces_the_traces_times_and_long_requests_are_left_out(
    server: FakeServer, tmp_path: Path
) -> None:
    trace = tmp_path / "t.csv"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for second, tokens in ((1, 10), (2, 9000), (59, 12)):
        text += f"2023-11-16 18:00:{second:02}.0000000,{tokens},3\n"
    trace.write_text(text)
    flags = ("--trace", str(trace), "--rate", "100", "--max-model-len", "100")
    told = run_json(server, tmp_path / "r.json", *flags)
    assert [len(body["prompt"]) for body in server.bodies] == [10, 12]
    assert told["samples"][1]["due_s"] < 1


def test_skipped_lines_are_told(server: FakeServer, tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "t.csv"
    good = "2023-11-16 18:00:01.0000000,4,3\n"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{good}broken\n")
    assert bench(server, "--trace", str(trace)) == 0
    assert "1 lines skipped (line 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", "1", "--sweep", "1", "2"),
        ("--ttft", "100"),
        ("--trace", "/no/such/file"),
        ("--rate", "1", "--burstiness", "0"),
    ],
)
def test_contradictions_are_one_line(
    server: FakeServer, flags: tuple[str, ...], capsys: Any
) -> None:
    assert bench(server, *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("baton bench: ")
    assert server.bodies == []


# ---------------------------------------------------------------- results


def test_goodput_counts_requests_within_both_limits() -> None:
    records = [record(0, 0.1, 0.01), record(1, 0.1, 0.05), record(2, 0.1, 0.01, "timeout")]
    told = result_json(records, {}, Slo(0.2, 0.02))
    assert told["attainment"]["good"] == pytest.approx(1 / 3)
    assert told["goodput_per_s"] == pytest.approx(1 / told["duration_s"])
    by_scale = {point["scale"]: point["good"] for point in told["attainment_by_scale"]}
    assert by_scale[0.25] == 0
    assert by_scale[8] == pytest.approx(2 / 3)
    assert [row["error"] for row in told["samples"]] == [None, None, "timeout"]


def test_phases_come_from_the_servers_header(server: FakeServer, tmp_path: Path) -> None:
    server.phases = PHASES
    told = run_json(server, tmp_path / "r.json", "--num-requests", "2")
    assert told["phases_ms"] == {"read": 0.5, "prefill": 2.5}


def test_a_header_of_another_shape_has_no_phases() -> None:
    assert server_phases(PHASES) == {"read": 0.5, "prefill": 2.5}
    assert server_phases("a;dur=1, a;dur=2, b, c;dur=x, ttft;dur=3") == {"a": 3.0}
    assert server_phases("total;dur=5") == server_phases("") == {}


def test_the_mean_is_over_requests_that_completed() -> None:
    assert mean_phases([record(0, 1, 1), record(0, 3, 1), record(0, 9, 1, "x")]) == {"prefill": 2}
    assert mean_phases([]) == {}


def test_the_fleet_is_watched_where_it_is_told(server: FakeServer, tmp_path: Path) -> None:
    server.fleets = [FLEET]
    told = run_json(server, tmp_path / "r.json", "--rate", "4", "--num-requests", "4")
    assert {sample["waiting"] for sample in told["fleet"]} == {2}
    assert told["fleet"][0]["nodes"] == [
        {
            "name": "decode-0",
            "role": "decode",
            "kv_used": 0.25,
            "running": 3,
            "waiting": 1,
            "queued_tokens": 9,
        }
    ]


# ---------------------------------------------------------------- pictures


def test_a_sweep_and_its_report(server: FakeServer, tmp_path: Path, capsys: Any) -> None:
    server.phases, server.fleets = PHASES, [FLEET]
    page, path = tmp_path / "r.html", tmp_path / "a&b.json"
    flags = ("--sweep", "40", "10", "--num-requests", "8", "--ttft", "500", "--tpot", "100")
    told = run_json(server, path, *flags, "--html", str(page))
    assert [run["settings"]["rate"] for run in told["runs"]] == [10, 40]
    assert "goodput" in capsys.readouterr().out
    html = page.read_text()
    assert html.count("<svg") >= 6
    for heading in ("Latency", "Over the rate", "Where the time", "The nodes while it ran"):
        assert f"<h2>{heading}" in html
    assert "<script" not in html

    both = tmp_path / "both.html"
    assert main(["report", str(path), str(path), "-o", str(both)]) == 0
    assert "a&amp;b at 10/s" in both.read_text()


def test_a_report_of_nothing_has_no_empty_pictures() -> None:
    html = html_report({"none": [("none", result_json([], {}, None))]})
    assert "<svg" not in html
    assert "0 of 0" in html


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "baton.bench-sweep/1"}', '{"a": 1}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str, capsys: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_results(path)
    assert main(["report", str(path), "-o", str(tmp_path / "o.html")]) == 1
    assert capsys.readouterr().err.startswith("baton bench report: ")
