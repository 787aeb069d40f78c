"""The pictures of a report, as SVG text; drawn by matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wire.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = ("#1f6b66", "#b7791f", "#7a4fa3", "#b3362b", "#3568a8", "#6b7a1f", "#8a5a44", "#4a4a4a")
LIMIT = "#b3261e"
DASHES = ("-", "--", ":", "-.")
SIZE = (6.4, 3.4)  # inches, without the legend
LEGEND_ROW = 0.18  # inches
LEGEND_WIDTH = 92  # characters
BAR = 0.32  # inches
MAX_NAME = 28  # characters of a name in a picture; the table beside it has all of it
WIDE = 8.0


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


@dataclass(frozen=True, slots=True)
class Limit:
    """A dashed line across a picture, with its name in the legend."""

    value: float
    name: str


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    whole_x: bool = False,
    marks: bool = True,
    top: float | None = None,
    limit: Limit | None = None,
) -> str:
    """Curves with their points, up to `top` or the highest; `limit` is drawn across."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas(x_label, y_label)
    for number, one in enumerate(series):
        marker = "o" if marks else ""
        axes.plot(one.x, one.y, marker=marker, markersize=4, **_look(number, one.name))
    if limit is not None:
        axes.axhline(limit.value, color=LIMIT, linestyle="--", linewidth=1, label=limit.name)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    if whole_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log_y and _is_wide([y for one in series for y in one.y]):
        _log_scale(axes, axes.yaxis)
    else:
        axes.set_ylim(0, top)
    return _finished(figure, axes)


def cdfs(samples: Mapping[str, Sequence[float]], *, x_label: str, limit: Limit | None) -> str:
    """The share of requests that took at most so long; `limit` is the SLO's."""
    figure, axes = _canvas(x_label, "share of completed requests")
    drawn = [Series(name, sorted(values), ()) for name, values in samples.items() if values]
    for number, one in enumerate(drawn):
        shares = [rank / len(one.x) for rank in range(len(one.x) + 1)]
        axes.step([one.x[0], *one.x], shares, where="post", **_look(number, one.name))
    if limit is not None:
        axes.axvline(limit.value, color=LIMIT, linestyle="--", linewidth=1, label=limit.name)
    axes.set_ylim(0, 1.02)
    if _is_wide([x for one in drawn for x in one.x]):
        _log_scale(axes, axes.xaxis)
    else:
        axes.set_xlim(left=0)
    return _finished(figure, axes)


def stacked_bars(
    bars: Mapping[str, Mapping[str, float]], *, x_label: str, right: float | None = None
) -> str:
    """One bar per run, cut into parts; parts of equal name have equal colours."""
    figure, axes = _canvas(x_label, "")
    figure.set_figheight(max(SIZE[1], 1.4 + BAR * len(bars)))
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    places = range(len(bars))
    left = [0.0] * len(bars)
    for number, part in enumerate(parts):
        widths = [bar.get(part, 0.0) for bar in bars.values()]
        axes.barh(places, widths, left=left, color=_color(number), label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(places, [shortened(name) for name in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, right)
    return _finished(figure, axes)


def shortened(name: str) -> str:
    """With its beginning and its end, where most names differ."""
    if len(name) <= MAX_NAME:
        return name
    return f"{name[: MAX_NAME // 2 - 1]} … {name[1 - MAX_NAME // 2 :]}"


def _canvas(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # only whoever wants pictures pays for it

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _is_wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic scale shows more than a linear one."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > WIDE * min(positive)


def _log_scale(axes: Axes, axis: Axis) -> None:
    """With plain numbers: 1, 2, 5, 10, 20, …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _look(number: int, name: str) -> dict[str, Any]:
    """Colours first, then the same ones dashed, so that a legend is never ambiguous."""
    dash = DASHES[number // len(COLORS) % len(DASHES)]
    return {"color": _color(number), "linestyle": dash, "label": shortened(name)}


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _finished(figure: Figure, axes: Axes) -> str:
    """With the legend above the picture, which grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:  # matplotlib warns of an empty one
        longest = max(map(len, labels))
        columns = max(1, min(4, len(labels), LEGEND_WIDTH // (longest + 6)))
        rows = -(-len(labels) // columns)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * rows)
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=columns,
            fontsize="small",
            frameon=False,
        )
    return _svg(figure)


def _svg(figure: Figure) -> str:
    """With text as text, without a date, and with ids that only depend on what is drawn."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "baton"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
