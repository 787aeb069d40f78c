"""What a run leaves behind: replayed traces, sweeps, phases, the fleet, and the pictures of it."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from baton.bench import main
from tests.tuner.conftest import FakeServer
from tuner.arrivals import Arrival
from tuner.client import Target, resolve_model
from tuner.drive import Limits
from tuner.goodput import Slo
from tuner.html_report import html_report
from tuner.record import RequestRecord, server_phases
from tuner.results import mean_phases, read_results, result_json
from tuner.settings import BenchSettings
from tuner.trace import Trace, TracedRequest
from tuner.workload import Span, Workload
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
SAMPLES = Path(__file__).resolve().parents[2] / "tuner" / "samples"
AZURE, PROMPTS = str(SAMPLES / "azure.csv"), str(SAMPLES / "prompts.jsonl")
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


def test_a_trace_at_a_rate_without_its_long_requests(
    server: FakeServer, tmp_path: Path, capsys: Any
) -> None:
    trace = tmp_path / "t.csv"
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    for second, tokens in ((1, 10), (2, 9000), (59, 12)):
        text += f"2023-11-16 18:00:{second:02}.0000000,{tokens},3\n"
    trace.write_text(text)
    flags = ("--trace", str(trace), "--rate", "100", "--max-model-len", "100")
    told = run_json(server, tmp_path / "r.json", *flags, "--num-requests", "9")
    assert [len(body["prompt"]) for body in server.bodies] == [10, 12]
    assert told["samples"][1]["due_s"] < 1
    assert capsys.readouterr().err.splitlines() == [
        "t.csv: 1 requests exceed --max-model-len, left out",
        "t.csv: only 2 requests, not --num-requests",
    ]


def test_a_rate_makes_a_trace_faster_and_an_arrival_replaces_its_times() -> None:
    times = [0.0, 1.0, 1.5, 8.0]
    trace = Trace("t", tuple(TracedRequest(at, 5, 5) for at in times))

    def settings(rate: float | None, arrival: Arrival | None) -> BenchSettings:
        limits, workload = Limits(None, None), Workload(Span(1, 1), Span(1, 1))
        target = Target("", None)
        return BenchSettings(target, workload, limits, 9, rate, arrival, 0, trace=trace)

    assert list(settings(None, None).offsets()) == times
    assert list(settings(3.0, None).offsets()) == [at / 8 for at in times]  # 3 gaps in 8 s
    assert list(islice(settings(4.0, Arrival.FIXED).offsets(), 3)) == [0, 0.25, 0.5]


def test_skipped_lines_are_told(server: FakeServer, tmp_path: Path, capsys: Any) -> None:
    trace = tmp_path / "t.csv"
    good = "2023-11-16 18:00:01.0000000,4,3\n"
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{good}broken\n")
    assert bench(server, "--trace", str(trace)) == 0
    assert "1 lines skipped (line 3: 1 columns, not 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--rate", "1", "--sweep", "1", "2"),
        ("--ttft", "100"),
        ("--trace", "/no/such/file"),
        ("--rate", "1", "--arrival", "gamma", "--burstiness", "0"),
        ("--rate", "1", "--arrival", "poisson", "--burstiness", "2"),
        ("--rate", "1", "--period", "5"),
        ("--arrival", "poisson"),
        ("--length-scale", "0.5"),
        ("--max-model-len", "100"),
        ("--trace", AZURE, "--rate-scale", "2", "--rate", "1"),
        ("--trace", PROMPTS, "--rate-scale", "2"),
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


def test_a_fleet_of_another_shape_is_not_watched(server: FakeServer, tmp_path: Path) -> None:
    server.fleets = [{"waiting": 1, "nodes": [{"name": "a"}]}]
    assert run_json(server, tmp_path / "r.json", "--num-requests", "2")["fleet"] == []


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

    # Each rate asks for the same lengths in other words: no run finds another one's prompts cached.
    sent = [[body["prompt"] for body in server.bodies[at : at + 8]] for at in (0, 8)]
    assert not set(map(tuple, sent[0])) & set(map(tuple, sent[1]))
    assert [run["prompt_tokens"] for run in told["runs"]] == [88, 88]

    both = tmp_path / "both.html"
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / path.name).write_text(path.read_text())
    files = [str(path), str(tmp_path / "old" / path.name)]
    assert main(["report", *files, "-o", str(both)]) == 0
    html = both.read_text()
    assert html.count("old/a&amp;b at 10/s</td>") == 1
    assert html.count("/a&amp;b at 10/s</td>") == 2  # equal names do not hide each other
    assert main(["report", files[0], files[0], "-o", str(both)]) == 1
    assert "given twice" in capsys.readouterr().err


def test_a_report_of_nothing_has_no_empty_pictures() -> None:
    html = html_report({"none": [("none", result_json([], {}, None))]})
    assert "<svg" not in html
    assert "0 of 0" in html
    assert ">0.0<" not in html  # no request completed in no time


def test_limits_that_differ_are_told_run_by_run() -> None:
    one = ("one", result_json([record(0, 0.1, 0.01)], {}, Slo(0.2, 0.02)))
    other = ("other", result_json([record(0, 0.1, 0.01)], {}, Slo(0.05, 0.02)))
    html = html_report({"one": [one], "other": [other]})
    assert "Limits: first token within" not in html
    assert ">200, 20<" in html
    assert ">50, 20<" in html
    assert "Limits: first token within 200 ms" in html_report({"one": [one]})


def test_single_runs_of_several_files_are_points_of_one_curve_each() -> None:
    def at(rate: float) -> Any:
        return result_json([record(0, 0.1, 0.01)], {"rate": rate}, Slo(0.2, 0.02))

    html = html_report({"a": [("a", at(1))], "b": [("b", at(2))]})
    assert "Attainment against the rate" in html
    assert "Throughput and time per token" in html
    assert "Over the rate" not in html_report({"a": [("a", at(1))]})


def test_a_server_that_goes_during_a_sweep_leaves_what_was_measured(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked = iter([True])

    async def gone_after_one(session: Any, target: Target) -> Target:
        if next(asked, None) is None:
            raise ConfigError("cannot reach it")
        return await resolve_model(session, target)

    monkeypatch.setattr("tuner.bench.resolve_model", gone_after_one)
    path = tmp_path / "r.json"
    assert bench(server, "--sweep", "50", "60", "--num-requests", "2", "--json", str(path)) == 1
    assert [run["settings"]["rate"] for run in json.loads(path.read_text())["runs"]] == [50]
    assert capsys.readouterr().err == "baton bench: cannot reach it\n"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "baton.bench-sweep/1"}', '{"a": 1}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str, capsys: Any) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json"):
        read_results(path, "x")
    assert main(["report", str(path), "-o", str(tmp_path / "o.html")]) == 1
    assert capsys.readouterr().err.startswith("baton bench report: ")
