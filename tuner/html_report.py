"""One HTML file from the results of one or several runs: a table, plots, settings. No scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tuner import plots
from tuner.plots import Limit, Series

Json = dict[str, Any]
Named = Sequence[tuple[str, Json]]  # a run's name and its result
Plots = list[tuple[str, str]]  # caption, SVG
MAX_TIMELINES = 4  # runs whose nodes are drawn one by one
WANTED = Limit(0.9, "90 %")
NOTHING = "–"  # where no request completed, or none was judged

_COLUMNS = (
    "run",
    "completed",
    "requests/s",
    "output tokens/s",
    "TTFT p50, ms",
    "p90",
    "p99",
    "TPOT p50, ms",
    "p90",
    "p99",
)


def html_report(groups: Mapping[str, Named], title: str = "baton bench") -> str:
    """The report; a group is a file: its runs share a curve over their rates."""
    runs = [run for group in groups.values() for run in group]
    judged = [run["slo"] for _, run in runs if "slo" in run]
    limits = [slo for number, slo in enumerate(judged) if slo not in judged[:number]]
    sections = [
        ("Latency", _latency(runs, limits[0] if len(limits) == 1 else None)),
        ("Over the rate", _over_rates(groups)),
        ("Over the limits", _over_limits(runs)),
        ("Where the time to first token went", _phases(runs)),
        _timelines(runs),
    ]
    return page(
        title,
        columns=[*_COLUMNS, *_judged_columns(limits)],
        rows=[[*_row(name, run), *_judged(run, limits)] for name, run in runs],
        sections=[(heading, drawn) for heading, drawn in sections if drawn],
        slo=limits[0] if len(limits) == 1 else None,
        errors=[
            f"{name}: {count} x {kind}: {run['error_examples'][kind]}"
            for name, run in runs
            for kind, count in run["errors"].items()
        ],
        settings=[(name, json.dumps(run["settings"], indent=2)) for name, run in runs],
    )


def page(
    title: str,
    *,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    sections: Sequence[tuple[str, Plots]],
    slo: Json | None,
    words: str = "",
    errors: Sequence[str] = (),
    settings: Sequence[tuple[str, str]] = (),
) -> str:
    """One file: words, a table, pictures, and what was asked for."""
    environment = Environment(
        loader=PackageLoader("tuner"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("report.html.j2").render(
        title=title,
        slo=slo,
        words=words,
        columns=columns,
        rows=rows,
        sections=sections,
        errors=errors,
        settings=settings,
    )


def _row(name: str, run: Json) -> list[str]:
    return [
        name,
        f"{run['num_completed']} of {run['num_requests']}",
        f"{run['requests_per_s']:.2f}",
        f"{run['output_tokens_per_s']:.0f}",
        *_quantiles(run["ttft_ms"], 1),
        *_quantiles(run["tpot_ms"], 2),
    ]


def _quantiles(summary: Json, digits: int) -> list[str]:
    if not summary["count"]:
        return [NOTHING] * 3
    return [f"{summary[key]:.{digits}f}" for key in ("p50", "p90", "p99")]


def _judged_columns(limits: Sequence[Json]) -> list[str]:
    """With the limits themselves where they differ from run to run."""
    if not limits:
        return []
    return [*(["TTFT, TPOT limits, ms"] if len(limits) > 1 else []), "attainment", "goodput/s"]


def _judged(run: Json, limits: Sequence[Json]) -> list[str]:
    if "slo" not in run:
        return [NOTHING] * len(_judged_columns(limits))
    told = [f"{run['attainment']['good']:.1%}", f"{run['goodput_per_s']:.2f}"]
    if len(limits) > 1:
        told.insert(0, f"{run['slo']['ttft_ms']:g}, {run['slo']['tpot_ms']:g}")
    return told


def _latency(runs: Named, slo: Json | None) -> Plots:
    return [
        (
            caption,
            plots.cdfs(
                {name: _sample(run, key) for name, run in runs},
                x_label=f"{key[:4].upper()}, ms",
                limit=None if slo is None else Limit(slo[key], f"limit: {slo[key]:g} ms"),
            ),
        )
        for key, caption in (("ttft_ms", "Time to first token"), ("tpot_ms", "Time per token"))
        if any(_sample(run, key) for _, run in runs)
    ]


def _sample(run: Json, key: str) -> list[float]:
    rows = [row for row in run["samples"] if row["error"] is None]
    return [row[key] for row in rows if row[key] is not None]


def _over_rates(groups: Mapping[str, Named]) -> Plots:
    """A curve per file with several runs, a point per file with one; nothing for a single run."""
    curves = {name: [run for _, run in group] for name, group in groups.items()}
    if sum(map(len, curves.values())) < 2:
        return []
    drawn = [
        (caption, picture)
        for key, caption in (("ttft_ms", "time to first token"), ("tpot_ms", "time per token"))
        if (picture := _throughput_latency(curves, key))
        for caption in (f"Throughput and {caption}, one point per run",)
    ]
    return [*drawn, *_attainment_over_rate(curves)]


def _over_limits(runs: Named) -> Plots:
    """Attainment if the limits were stricter or looser."""
    series = [_by_scale(name, run) for name, run in runs if "slo" in run]
    if not series:
        return []
    picture = plots.lines(
        series,
        x_label="limits times",
        y_label="share within both limits",
        log_x=True,
        top=1.05,
        limit=WANTED,
    )
    return [("Requests within both limits, if these were stricter or looser", picture)]


def _by_scale(name: str, run: Json) -> Series:
    points = run["attainment_by_scale"]
    return Series(name, [p["scale"] for p in points], [p["good"] for p in points])


def _throughput_latency(curves: Mapping[str, Sequence[Json]], key: str) -> str:
    """Empty if no run has this latency."""
    series = []
    for name, runs in curves.items():
        seen = [run for run in runs if run[key]["count"]]
        throughput = [run["output_tokens_per_s"] for run in seen]
        for share in ("p50", "p99"):
            latency = [run[key][share] for run in seen]
            series.append(Series(f"{share}, {name}", throughput, latency))
    if not any(one.x for one in series):
        return ""
    return plots.lines(
        [one for one in series if one.x],
        x_label="output tokens/s",
        y_label=f"{key[:4].upper()}, ms",
        log_y=True,
    )


def _attainment_over_rate(curves: Mapping[str, Sequence[Json]]) -> Plots:
    series = []
    for name, runs in curves.items():
        judged = [run for run in runs if "slo" in run and run["settings"].get("rate")]
        rates = [run["settings"]["rate"] for run in judged]
        if judged:
            series.append(Series(name, rates, [run["attainment"]["good"] for run in judged]))
    if not series:
        return []
    picture = plots.lines(
        series,
        x_label="requests/s sent",
        y_label="share within both limits",
        top=1.05,
        limit=WANTED,
    )
    return [("Attainment against the rate", picture)]


def _phases(runs: Named) -> Plots:
    bars = {name: run["phases_ms"] for name, run in runs if run.get("phases_ms")}
    if not bars:
        return []
    return [("Mean per request, as the server told it", plots.stacked_bars(bars, x_label="ms"))]


def _timelines(runs: Named) -> tuple[str, Plots]:
    """The heading says how many runs there was no room for."""
    watched = [(name, run["fleet"]) for name, run in runs if len(run.get("fleet") or ()) > 1]
    heading = "The nodes while it ran"
    if len(watched) > MAX_TIMELINES:
        heading += f" (the first {MAX_TIMELINES} of {len(watched)} runs)"
    drawn: Plots = []
    for name, fleet in watched[:MAX_TIMELINES]:
        for key, label in (("kv_used", "share of KV in use"), ("running", "running requests")):
            series = _node_series(fleet, key)
            picture = plots.lines(series, x_label="s", y_label=label, marks=False)
            drawn.append((f"{name}: {label}", picture))
    return heading, drawn


def _node_series(fleet: Sequence[Json], key: str) -> list[Series]:
    """One line per node; a node that came late or left has a shorter one."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for sample in fleet:
        for node in sample["nodes"]:
            xs, ys = points.setdefault(f"{node['name']} ({node['role']})", ([], []))
            xs.append(sample["at_s"])
            ys.append(node[key])
    return [Series(name, xs, ys) for name, (xs, ys) in sorted(points.items())]
