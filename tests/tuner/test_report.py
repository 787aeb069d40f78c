"""Statistics and reports, against values worked out by hand and by numpy."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tuner.record import RequestRecord
from tuner.report import (
    Report,
    build_report,
    is_late,
    late_line,
    latency_table,
    overview_lines,
    percentile,
    summarize,
    to_json,
)

RECORDS = [
    RequestRecord(0, 0.0, 0.0, 2.0, (0.5, 1.0, 1.5), prompt_tokens=10, output_tokens=3),
    RequestRecord(1, 0.0, 0.25, 4.0, (1.25, 3.25), prompt_tokens=20, output_tokens=5),
    RequestRecord(2, 1.0, 1.0, 5.0, (1.5,), error="http_503", message="no capacity"),
    RequestRecord(3, 1.0, 1.0, 5.0, error="http_503", message="still none"),
    RequestRecord(4, 1.0, 1.0, 5.0, error="timeout", message="late"),
]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float) -> None:
    expected = float(np.percentile(values, share * 100))
    assert percentile(sorted(values), share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_summary() -> None:
    summary = summarize([4.0, 1.0, 2.0, 3.0])
    assert (summary.count, summary.mean, summary.p50, summary.max) == (4, 2.5, 2.5, 4.0)
    assert summarize([]).count == 0


def test_report_counts_only_completed_requests() -> None:
    report = build_report(RECORDS)
    assert (report.num_requests, report.num_completed) == (5, 2)
    assert report.completed_fraction == 0.4
    assert report.duration_s == 5.0
    assert (report.prompt_tokens, report.output_tokens) == (30, 8)
    assert report.requests_per_s == 0.4
    assert report.output_tokens_per_s == pytest.approx(1.6)
    assert report.total_tokens_per_s == pytest.approx(7.6)
    assert report.ttft_ms.mean == 750.0
    assert report.tpot_ms.mean == 500.0
    assert (report.itl_ms.count, report.itl_ms.mean) == (3, 1000.0)
    assert report.e2e_ms.max == 3750.0
    assert report.late_ms.max == 250.0


def test_errors_by_kind_with_their_first_message() -> None:
    report = build_report(RECORDS)
    assert report.errors == {"http_503": 2, "timeout": 1}
    assert report.error_examples["http_503"] == "no capacity"


def test_an_empty_run_has_a_report() -> None:
    report = build_report([])
    assert report.completed_fraction == 0
    assert "-" in rendered(latency=True, records=[])


def test_json_round_trip_and_shape() -> None:
    body = json.loads(json.dumps(to_json(build_report(RECORDS), {"seed": 1})))
    assert body["schema"] == "baton.bench/1"
    assert body["settings"] == {"seed": 1}
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "late_ms"):
        assert set(body[name]) == {"count", "mean", "p50", "p90", "p99", "max"}


def test_table_and_overview() -> None:
    table = rendered(latency=True, records=RECORDS)
    for name in ("TTFT", "TPOT", "ITL", "end to end", "750.00"):
        assert name in table
    overview = rendered(latency=False, records=RECORDS)
    assert "2 of 5 completed (40.0%)" in overview
    assert "2 x http_503: no capacity" in overview


def test_lateness_is_told_where_it_spoils_the_figures() -> None:
    def late_by(seconds: float, ttft: float) -> Report:
        return build_report([RequestRecord(0, 0.0, seconds, 9.0, (seconds + ttft,))])

    assert not is_late(late_by(0.01, 0.001))
    assert not is_late(late_by(0.1, 2.0))
    assert is_late(late_by(0.1, 0.5))
    assert "sent 100 ms (p50)" in late_line(late_by(0.1, 0.5), 8)
    assert "limit of 8" in late_line(late_by(0.1, 0.5), 8)


def rendered(*, latency: bool, records: list[RequestRecord]) -> str:
    report = build_report(records)
    out = io.StringIO()
    console = Console(file=out, width=120)
    if latency:
        console.print(latency_table(report))
    else:
        console.print("\n".join(overview_lines(report)), markup=False)
    return out.getvalue()
