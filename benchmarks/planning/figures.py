"""What a run is judged by, and how far a simulated run is from real ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from tuner.goodput import Slo, attainment
from tuner.record import RequestRecord
from tuner.report import build_report

Figures = Mapping[str, float]

UNITS = {"ttft": "ms", "tpot": "ms", "throughput": "tokens/s", "goodput": "requests/s"}
LIMITS = {"p50": 0.10, "p90": 0.20, "goodput": 0.10}  # what an error should stay below


def figures_of(records: Sequence[RequestRecord], slo: Slo) -> Figures:
    """Percentiles in milliseconds, output tokens and good requests per second."""
    report = build_report(records)
    found = {
        f"{name}_{share}": getattr(summary, share)
        for name, summary in (("ttft", report.ttft_ms), ("tpot", report.tpot_ms))
        for share in ("p50", "p90", "p99")
    }
    good = attainment(records, slo).good * len(records)
    found["throughput"] = report.output_tokens_per_s
    found["goodput"] = good / report.duration_s if report.duration_s else 0.0
    return found


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one workload."""

    workload: str
    name: str
    real: float  # mean of the runs
    spread: float  # of the runs: largest less smallest, relative to their mean
    simulated: float  # mean over the paces
    drift: float  # of the simulated one, from pace to pace: what the machine did meanwhile

    @property
    def error(self) -> float:
        """Relative; where the real one is 0, 0 or infinite."""
        return _relative(abs(self.simulated - self.real), self.real)

    @property
    def limit(self) -> float:
        """What the error should be within: the goal, or the runs' own spread if that is larger."""
        return max(self.goal, self.spread)

    @property
    def goal(self) -> float:
        return LIMITS.get(self.name, LIMITS.get(self.name.rpartition("_")[2], float("inf")))

    @property
    def within(self) -> bool:
        return self.error <= self.limit


def _relative(difference: float, base: float) -> float:
    if base:
        return difference / abs(base)
    return 0.0 if not difference else float("inf")


def compare(workload: str, real: Sequence[Figures], simulated: Sequence[Figures]) -> list[Row]:
    """A row per figure, of real runs and of simulated ones at several paces."""
    return [
        Row(workload, name, *_spread(name, real), *_spread(name, simulated))
        for name in simulated[0]
    ]


def _spread(name: str, runs: Sequence[Figures]) -> tuple[float, float]:
    """The mean of a figure, and how far the runs are apart, relative to it."""
    values = [figures[name] for figures in runs]
    middle = mean(values)
    return middle, _relative(max(values) - min(values), middle)


def worst(rows: Iterable[Row], name: str) -> float:
    """The largest error of a figure over all workloads."""
    return max(row.error for row in rows if row.name == name)


def table(rows: Iterable[Row]) -> str:
    """As Markdown."""
    lines = [
        "| workload | figure | real | spread of the runs | simulated | paces apart | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unit = UNITS[row.name.partition("_")[0]]
        mark = "" if row.within else " (beyond the goal)"
        mark = " (by the spread)" if row.within and row.error > row.goal else mark
        lines.append(
            f"| {row.workload} | {row.name.replace('_', ' ')}, {unit} | {row.real:.4g} | "
            f"{row.spread:.1%} | {row.simulated:.4g} | {row.drift:.1%} | {row.error:.1%}{mark} |"
        )
    return "\n".join(lines)
