"""A plan's pictures: what each split carries, how it fails, and where the best one is busy."""

from __future__ import annotations

from collections.abc import Sequence

from baton.simulation.planner import Candidate, Plan
from tuner import plots
from tuner.html_report import page
from tuner.plots import Limit, Series

MAX_CURVES = 8  # as many as there are colours
COLUMNS = ("fleet", "tokens per step", "requests/s", "per node", "at most good")


def plan_html(plan: Plan, words: str) -> str:
    """One HTML file; `words` is what the command prints."""
    slo = {"ttft_ms": 1e3 * plan.slo.ttft_s, "tpot_ms": 1e3 * plan.slo.tpot_s}
    ordered = sorted(plan.candidates, key=_worth, reverse=True)
    drawn = [
        ("What each split carries", [_goodput(plan.candidates), _attainment(plan, ordered)]),
        ("The best fleet over the rate", [_latency(plan), _busy(plan)]),
    ]
    return page(
        "baton plan",
        columns=COLUMNS,
        rows=[_row(candidate) for candidate in ordered],
        sections=drawn,
        slo=slo,
        words=words,
    )


def _worth(candidate: Candidate) -> tuple[float, float]:
    return candidate.rate, candidate.most_good


def _row(candidate: Candidate) -> list[str]:
    return [
        str(candidate.split),
        str(candidate.token_budget),
        f"{candidate.rate:.3g}",
        f"{candidate.per_node:.3g}",
        f"{candidate.most_good:.1%}",
    ]


def _goodput(candidates: Sequence[Candidate]) -> tuple[str, str]:
    """Over the number of prefill nodes; 0 is where the colocated fleet stands."""
    num_splits = len({candidate.split for candidate in candidates})
    series = []
    for budget in dict.fromkeys(candidate.token_budget for candidate in candidates):
        ones = [c for c in candidates if c.token_budget == budget]
        if len(ones) == num_splits:
            series.append(_by_split(f"{budget} tokens per step", ones))
    best = {c.split: c for c in sorted(candidates, key=_worth)}  # its best budget stays
    if len(candidates) > num_splits * len(series):
        series.append(_by_split("the best of all token budgets", list(best.values())))
    picture = plots.lines(
        series,
        x_label="prefill nodes (0: all colocated)",
        y_label="good requests/s per node",
        whole_x=True,
    )
    return "Goodput per node by split", picture


def _by_split(name: str, candidates: Sequence[Candidate]) -> Series:
    ones = sorted(candidates, key=lambda candidate: candidate.split.prefill)
    return Series(name, [float(c.split.prefill) for c in ones], [c.per_node for c in ones])


def _attainment(plan: Plan, ordered: Sequence[Candidate]) -> tuple[str, str]:
    best = {candidate.split: candidate for candidate in reversed(ordered)}  # the best budget stays
    chosen = sorted(best.values(), key=_worth, reverse=True)[:MAX_CURVES]
    series = [
        Series(
            f"{c.split}, {c.token_budget}",
            [p.rate for p in c.points],
            [p.attained.good for p in c.points],
        )
        for c in chosen
    ]
    picture = plots.lines(
        series,
        x_label="requests/s",
        y_label="share within both limits",
        log_x=True,
        top=1.05,
        limit=Limit(plan.share, f"wanted: {plan.share:.0%}"),
    )
    return "Requests within both limits, each split with its best token budget", picture


def _latency(plan: Plan) -> tuple[str, str]:
    points = plan.best.points
    rates = [point.rate for point in points]
    series = [
        Series("TTFT", rates, [point.ttft_s.p90 / plan.slo.ttft_s for point in points]),
        Series("TPOT", rates, [point.tpot_s.p90 / plan.slo.tpot_s for point in points]),
    ]
    picture = plots.lines(
        series,
        x_label="requests/s",
        y_label="90th percentile / limit",
        log_x=True,
        log_y=True,
        limit=Limit(1.0, "the limit"),
    )
    return f"{plan.best}: times relative to their limits", picture


def _busy(plan: Plan) -> tuple[str, str]:
    """At the highest rate that it carries, else at the lowest that was tried."""
    points = plan.best.points
    point = max((p for p in points if p.rate <= plan.best.rate), key=lambda p: p.rate, default=None)
    point = point or points[0]
    shares = sorted(point.busy.items())[: 2 * MAX_CURVES]
    bars = {name: {"computes": share} for name, share in shares}
    picture = plots.stacked_bars(bars, x_label="share of the time", right=1.0)
    return f"{plan.best} at {point.rate:.3g} requests per second", picture
