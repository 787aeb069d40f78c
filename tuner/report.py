"""From records to figures: statistics, the JSON report and the table. No I/O, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from tuner.record import RequestRecord

SCHEMA = "baton.bench/1"
LATE_MS = 20.0  # an event loop on a busy machine may be so late
LATE_SHARE = 0.1  # of the median TTFT


@dataclass(frozen=True, slots=True)
class Summary:
    """Where the mass of a sample lies; all zero for an empty one."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of an ordered, non-empty sample lies.

    Between two ranks it interpolates linearly (Hyndman and Fan's type 7, numpy's default).
    """
    rank = share * (len(ordered) - 1)
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def summarize(values: Iterable[float]) -> Summary:
    """The summary of a sample in any order."""
    ordered = sorted(values)
    if not ordered:
        return Summary(0, 0.0, 0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Summary(len(ordered), sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Report:
    """A run in figures. Latencies are in milliseconds, of completed requests only."""

    duration_s: float  # first request sent to last response ended
    num_requests: int
    num_completed: int
    completed_fraction: float
    errors: dict[str, int]  # by kind
    error_examples: dict[str, str]
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Summary
    tpot_ms: Summary
    itl_ms: Summary
    e2e_ms: Summary
    late_ms: Summary  # sent after the schedule's time: large values mean the client was the limit


def build_report(records: Sequence[RequestRecord]) -> Report:
    """The figures of a run; of an empty one too."""
    completed = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    duration = _duration(records)
    prompt_tokens = sum(record.prompt_tokens for record in completed)
    output_tokens = sum(record.output_tokens for record in completed)
    return Report(
        duration_s=duration,
        num_requests=len(records),
        num_completed=len(completed),
        completed_fraction=_per(len(completed), len(records)),
        errors=dict(Counter(str(record.error) for record in failed).most_common()),
        error_examples={str(record.error): record.message for record in reversed(failed)},
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_s=_per(len(completed), duration),
        output_tokens_per_s=_per(output_tokens, duration),
        total_tokens_per_s=_per(prompt_tokens + output_tokens, duration),
        ttft_ms=_milliseconds(record.ttft for record in completed),
        tpot_ms=_milliseconds(record.tpot for record in completed),
        itl_ms=_milliseconds(itl for record in completed for itl in record.itls),
        e2e_ms=_milliseconds(record.e2e for record in completed),
        late_ms=_milliseconds(record.start - record.due for record in records),
    )


def is_late(report: Report) -> bool:
    """Whether so many requests were sent late that the figures are the client's as well."""
    late, ttft = report.late_ms.p90, report.ttft_ms.p50
    return late > LATE_MS and late > LATE_SHARE * ttft


def late_line(report: Report, concurrency: int) -> str:
    late = report.late_ms
    return (
        f"late       sent {late.p50:.0f} ms (p50), {late.p90:.0f} ms (p90) after their time, which "
        f"no latency counts: this client, or its limit of {concurrency} in flight, was too slow"
    )


def _duration(records: Sequence[RequestRecord]) -> float:
    if not records:
        return 0.0
    return max(record.end for record in records) - min(record.start for record in records)


def _per(amount: float, whole: float) -> float:
    return amount / whole if whole > 0 else 0.0


def _milliseconds(seconds: Iterable[float | None]) -> Summary:
    return summarize(value * 1e3 for value in seconds if value is not None)


def to_json(report: Report, settings: dict[str, Any]) -> dict[str, Any]:
    """The report as a JSON object, with the settings that led to it. `docs/bench.md` lists it."""
    return {"schema": SCHEMA, "settings": settings, **asdict(report)}


def latency_table(report: Report) -> Table:
    """The latencies, one line each."""
    table = Table(title="Latency in ms, completed requests")
    table.add_column("")
    for column in ("mean", "p50", "p90", "p99", "max"):
        table.add_column(column, justify="right")
    for name, summary in (
        ("TTFT", report.ttft_ms),
        ("TPOT", report.tpot_ms),
        ("ITL", report.itl_ms),
        ("end to end", report.e2e_ms),
        ("sent late by", report.late_ms),
    ):
        table.add_row(name, *_cells(summary))
    return table


def _cells(summary: Summary) -> list[str]:
    if not summary.count:
        return ["-"] * 5
    values = (summary.mean, summary.p50, summary.p90, summary.p99, summary.max)
    return [f"{value:,.2f}" for value in values]


def overview_lines(report: Report) -> list[str]:
    """Counts, throughput and errors in words."""
    lines = [
        f"requests   {report.num_completed} of {report.num_requests} completed "
        f"({report.completed_fraction:.1%}) in {report.duration_s:.2f} s, "
        f"{report.requests_per_s:.2f} per second",
        f"tokens     {report.prompt_tokens} in, {report.output_tokens} out; "
        f"{report.output_tokens_per_s:.1f} out per second, {report.total_tokens_per_s:.1f} in all",
    ]
    for kind, number in report.errors.items():
        lines.append(f"error      {number} x {kind}: {report.error_examples[kind]}")
    return lines
