"""One HTML file from the results of one or several runs: a table, plots, settings. No scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tuner import plots
from tuner.plots import Series

Json = dict[str, Any]
Named = Sequence[tuple[str, Json]]  # a run's name and its result
Plots = list[tuple[str, str]]  # caption, SVG
MAX_TIMELINES = 4  # runs whose nodes are drawn one by one

_COLUMNS = (
    "run",
    "completed",
    "requests/s",
    "output tokens/s",
    "TTFT p50",
    "p90",
    "p99 ms",
    "TPOT p50",
    "p90",
    "p99 ms",
)


def html_report(groups: Mapping[str, Named], title: str = "baton bench") -> str:
    """The report; a group is a file: its runs share a curve over their rates."""
    runs = [run for group in groups.values() for run in group]
    slo = next((run["slo"] for _, run in runs if "slo" in run), None)
    sections = [
        ("Latency", _latency(runs, slo)),
        ("Over the rate", _over_rates(groups)),
        ("Where the time to first token went", _phases(runs)),
        ("The nodes while it ran", _timelines(runs)),
    ]
    return page(
        title,
        columns=[*_COLUMNS, *(["attainment", "goodput/s"] if slo else [])],
        rows=[_row(name, run, slo is not None) for name, run in runs],
        sections=[(heading, drawn) for heading, drawn in sections if drawn],
        slo=slo,
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


def _row(name: str, run: Json, with_slo: bool) -> list[str]:
    ttft, tpot = run["ttft_ms"], run["tpot_ms"]
    cells = [
        name,
        f"{run['num_completed']} of {run['num_requests']}",
        f"{run['requests_per_s']:.2f}",
        f"{run['output_tokens_per_s']:.0f}",
        *(f"{ttft[key]:.1f}" for key in ("p50", "p90", "p99")),
        *(f"{tpot[key]:.2f}" for key in ("p50", "p90", "p99")),
    ]
    if with_slo and "attainment" in run:
        cells += [f"{run['attainment']['good']:.1%}", f"{run['goodput_per_s']:.2f}"]
    elif with_slo:
        cells += ["–", "–"]
    return cells


def _latency(runs: Named, slo: Json | None) -> Plots:
    return [
        (
            caption,
            plots.cdfs(
                {name: _sample(run, key) for name, run in runs},
                x_label="ms",
                limit=None if slo is None else slo[key],
            ),
        )
        for key, caption in (("ttft_ms", "Time to first token"), ("tpot_ms", "Time per token"))
        if any(_sample(run, key) for _, run in runs)
    ]


def _sample(run: Json, key: str) -> list[float]:
    rows = [row for row in run["samples"] if row["error"] is None]
    return [row[key] for row in rows if row[key] is not None]


def _over_rates(groups: Mapping[str, Named]) -> Plots:
    """Curves of the groups that have several rates, and of single runs over the SLO's scale."""
    sweeps = {
        name: [run for _, run in group if run["settings"].get("rate")]
        for name, group in groups.items()
        if len(group) > 1
    }
    drawn: Plots = []
    if any(len(runs) > 1 for runs in sweeps.values()):
        drawn += [_throughput_latency(sweeps)]
        if any("attainment" in run for runs in sweeps.values() for run in runs):
            drawn.append(_attainment_over_rate(sweeps))
    judged = [(name, run) for group in groups.values() for name, run in group if "slo" in run]
    if judged:
        series = [_by_scale(name, run) for name, run in judged]
        picture = plots.lines(
            series, x_label="limits times …", y_label="attainment", log_x=True, limit=0.9
        )
        drawn.append(("Requests within both limits, if these were stricter or looser", picture))
    return drawn


def _by_scale(name: str, run: Json) -> Series:
    points = run["attainment_by_scale"]
    return Series(name, [p["scale"] for p in points], [p["good"] for p in points])


def _throughput_latency(sweeps: Mapping[str, Sequence[Json]]) -> tuple[str, str]:
    series = [
        Series(
            f"{name} {key}",
            [run["output_tokens_per_s"] for run in runs],
            [run["ttft_ms"][key] for run in runs],
        )
        for name, runs in sweeps.items()
        for key in ("p50", "p99")
    ]
    picture = plots.lines(series, x_label="output tokens/s", y_label="TTFT, ms", log_y=True)
    return "Throughput and time to first token, one point per rate", picture


def _attainment_over_rate(sweeps: Mapping[str, Sequence[Json]]) -> tuple[str, str]:
    series = []
    for name, runs in sweeps.items():
        judged = [run for run in runs if "attainment" in run]
        rates = [run["settings"]["rate"] for run in judged]
        series.append(Series(name, rates, [run["attainment"]["good"] for run in judged]))
    picture = plots.lines(
        series, x_label="requests/s sent", y_label="within both limits", limit=0.9
    )
    return "Attainment against the rate", picture


def _phases(runs: Named) -> Plots:
    bars = {name: run["phases_ms"] for name, run in runs if run.get("phases_ms")}
    if not bars:
        return []
    return [("Mean per request, as the server told it", plots.stacked_bars(bars, x_label="ms"))]


def _timelines(runs: Named) -> Plots:
    watched = [(name, run["fleet"]) for name, run in runs if len(run.get("fleet") or ()) > 1]
    drawn: Plots = []
    for name, fleet in watched[:MAX_TIMELINES]:
        for key, label in (("kv_used", "share of KV in use"), ("running", "running requests")):
            series = _node_series(fleet, key)
            picture = plots.lines(series, x_label="s", y_label=label, marks=False)
            drawn.append((f"{name}: {label}", picture))
    return drawn


def _node_series(fleet: Sequence[Json], key: str) -> list[Series]:
    """One line per node; a node that came late or left has a shorter one."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for sample in fleet:
        for node in sample["nodes"]:
            xs, ys = points.setdefault(f"{node['name']} ({node['role']})", ([], []))
            xs.append(sample["at_s"])
            ys.append(node[key])
    return [Series(name, xs, ys) for name, (xs, ys) in sorted(points.items())]
