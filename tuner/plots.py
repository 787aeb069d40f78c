"""The pictures of a report, as SVG text; drawn by matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wire.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#1f6b66", "#b7791f", "#7a4fa3", "#b3362b", "#3568a8", "#6b7a1f", "#8a5a44", "#4a4a4a")
LIMIT = "#b3261e"
SIZE = (6.4, 3.6)  # inches


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a picture."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def require_matplotlib() -> None:
    """Raises ConfigError where it is not installed; better before the load than after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "reports with plots need matplotlib: pip install 'baton-serve[plots]'"
        ) from error


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    marks: bool = True,
    limit: float | None = None,
) -> str:
    """Curves with their points; `limit` is drawn across."""
    figure, axes = _canvas(x_label, y_label)
    for number, one in enumerate(series):
        marker = "o" if marks else ""
        axes.plot(one.x, one.y, marker=marker, markersize=4, color=_color(number), label=one.name)
    if limit is not None:
        axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _legend(axes, series)
    return _svg(figure)


def cdfs(samples: Mapping[str, Sequence[float]], *, x_label: str, limit: float | None) -> str:
    """The share of requests that took at most so long; `limit` is the SLO's."""
    figure, axes = _canvas(x_label, "share of completed requests")
    drawn = [Series(name, sorted(values), ()) for name, values in samples.items() if values]
    for number, one in enumerate(drawn):
        shares = [(rank + 1) / len(one.x) for rank in range(len(one.x))]
        axes.step(one.x, shares, where="post", color=_color(number), label=one.name)
    if limit is not None:
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1.02)
    if drawn and max(max(one.x) for one in drawn) > 0:
        axes.set_xscale("log")
    _legend(axes, drawn)
    return _svg(figure)


def stacked_bars(bars: Mapping[str, Mapping[str, float]], *, x_label: str) -> str:
    """One bar per run, cut into parts; parts of equal name have equal colours."""
    figure, axes = _canvas(x_label, "")
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    names = list(bars)
    left = [0.0] * len(names)
    for number, part in enumerate(parts):
        widths = [bars[name].get(part, 0.0) for name in names]
        axes.barh(names, widths, left=left, color=_color(number), label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    return _svg(figure)


def _canvas(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # only whoever wants pictures pays for it

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(axes: Axes, drawn: Sequence[Series]) -> None:
    if drawn:  # matplotlib warns of an empty one
        axes.legend(fontsize="small", frameon=False)


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _svg(figure: Figure) -> str:
    """With text as text, without a date, and with ids that only depend on what is drawn."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "baton"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
