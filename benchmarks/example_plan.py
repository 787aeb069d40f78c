"""`make example-plan`: the plan of an example, in words and as a picture.

Four nodes for a mixed load: chats, and three requests in twenty with a long prompt. The latency
model is the 88 M random model's on one thread of a Xeon, rounded, so that plan and picture are the
same anywhere; `baton plan --html` draws the same of a profile and a workload of one's own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baton.plan import plan_lines
from baton.simulation.planner import Candidate, Plan, Planner, Point
from baton.simulation.setup import Setup, Split
from benchmarks.planning.beside import load
from benchmarks.planning.real import KV_BYTES, MAX_MODEL_LEN, MAX_NUM_SEQS
from benchmarks.serve.processes import ROOT
from engine.config import EngineConfig
from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.overheads import Overheads
from tuner.plots import COLORS, LIMIT
from wire.layout import KVLayout

OUTPUT = ROOT / "docs" / "example-plan.png"
MODEL = LatencyModel((33e-3, 1e-3, 2.5e-7), (27e-3, 1.5e-5, 1e-4), (2e-4, 1.5e-10))
OVERHEADS = Overheads(front_s=5e-3, handoff_s=10e-3, step_s=1e-3)
LAYOUT = KVLayout(12, 4, 64, 16, "float32")
SLO = Slo(5.0, 0.075)
SHARE = 0.9
NUM_NODES = 4
BUDGETS = (64, 512, 2048)
NUM_REQUESTS = 400


def setup() -> Setup:
    engine = EngineConfig(
        block_size=LAYOUT.block_size,
        num_blocks=KV_BYTES // LAYOUT.block_bytes,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
    )
    return Setup(Split(mixed=1), engine, LAYOUT, MODEL, OVERHEADS)


def draw(plan: Plan) -> Figure:
    """What each split carries, how it fails, and what the best one does at each rate."""
    figure = Figure(figsize=(10.0, 7.0), layout="constrained")
    panels = figure.subplots(2, 2)
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    _draw_goodput(panels[0, 0], plan)
    _draw_attainment(panels[0, 1], plan)
    _draw_times(panels[1, 0], plan)
    _draw_busy(panels[1, 1], plan)
    return figure


def _name(split: Split) -> str:
    return f"{split.mixed} colocated" if split.mixed else f"{split.prefill}P + {split.decode}D"


def _draw_goodput(panel: Axes, plan: Plan) -> None:
    """A group of bars per split, one bar per token budget."""
    splits = list(dict.fromkeys(candidate.split for candidate in plan.candidates))
    width = 0.8 / len(BUDGETS)
    for number, budget in enumerate(BUDGETS):
        rates = {c.split: c.rate for c in plan.candidates if c.token_budget == budget}
        places = [index + width * (number - (len(BUDGETS) - 1) / 2) for index in range(len(splits))]
        heights = [rates[split] for split in splits]
        label = f"{budget} tokens per step"
        panel.bar(places, heights, width, color=COLORS[number], label=label)
    panel.set_xticks(range(len(splits)), [_name(split) for split in splits])
    panel.set_ylim(top=1.35 * plan.best.rate)  # for the legend
    panel.set_ylabel("good requests/s")
    panel.set_title("What each split carries", fontsize="medium")
    panel.legend(fontsize="small", frameon=False)


def _draw_attainment(panel: Axes, plan: Plan) -> None:
    """Each split with its best token budget."""
    best: dict[Split, Candidate] = {}
    for candidate in plan.candidates:
        known = best.setdefault(candidate.split, candidate)
        if (candidate.rate, candidate.most_good) > (known.rate, known.most_good):
            best[candidate.split] = candidate
    for number, (split, candidate) in enumerate(sorted(best.items(), key=lambda kv: kv[0].prefill)):
        points = candidate.points
        panel.plot(
            [point.rate for point in points],
            [point.attained.good for point in points],
            marker="o",
            markersize=3,
            color=COLORS[number],
            label=f"{_name(split)}, {candidate.token_budget}",
        )
    panel.axhline(plan.share, color=LIMIT, linestyle="--", linewidth=1)
    _log_rates(panel)
    panel.set_ylim(0, 1.05)
    panel.set_ylabel("share within both limits")
    panel.set_title("How it fails beyond that", fontsize="medium")
    panel.legend(fontsize="small", frameon=False)


def _draw_times(panel: Axes, plan: Plan) -> None:
    points = plan.best.points
    rates = [point.rate for point in points]
    for number, (name, limit) in enumerate((("ttft", plan.slo.ttft_s), ("tpot", plan.slo.tpot_s))):
        for share, style in (("p50", ":"), ("p90", "-")):
            seen = [getattr(getattr(point, f"{name}_s"), share) / limit for point in points]
            label = f"{name.upper()} {share}"
            panel.plot(rates, seen, linestyle=style, color=COLORS[number], label=label)
    panel.axhline(1.0, color=LIMIT, linestyle="--", linewidth=1)
    _log_rates(panel)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylabel("parts of the limit")
    panel.set_title(f"The best, {_name(plan.best.split)}: its times", fontsize="medium")
    panel.legend(fontsize="small", frameon=False)


def _draw_busy(panel: Axes, plan: Plan) -> None:
    point = at_goodput(plan)
    names = sorted(point.busy)
    panel.barh(names, [point.busy[name] for name in names], color=COLORS[0], height=0.6)
    panel.invert_yaxis()
    panel.set_xlim(0, 1)
    panel.set_xlabel("share of the time in which it computes")
    panel.set_title(f"Its nodes at {point.rate:.2f} requests/s", fontsize="medium")


def at_goodput(plan: Plan) -> Point:
    """The highest rate that the best fleet was seen to carry."""
    held = [point for point in plan.best.points if point.rate <= plan.best.rate]
    return max(held, key=lambda point: point.rate)


def _log_rates(panel: Axes) -> None:
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlabel("requests/s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=OUTPUT, metavar="FILE", help="PNG (%(default)s)"
    )
    args = parser.parse_args()
    planner = Planner(setup(), load(NUM_REQUESTS), SLO, SHARE)
    plan = planner.plan(NUM_NODES, BUDGETS)
    print("\n".join(plan_lines(plan)))
    draw(plan).savefig(args.output, dpi=110)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
