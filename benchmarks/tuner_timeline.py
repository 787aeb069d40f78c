"""`make tuner-timeline`: what the online tuner does while the work changes, as a picture.

Six simulated nodes; long prompts come first, long answers then. Drawn over time: the work that
comes, who serves it, the pressures that the tuner sees, and the share of requests within both
limits, beside the best static split and beside who knows beforehand when the work changes.

The latency model is the bundled model's on one thread of a Xeon, rounded, so that the picture is
the same anywhere; `--profile` takes another.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import Simulated
from benchmarks.planning.real import KV_BYTES, MAX_MODEL_LEN, MAX_NUM_SEQS, setup_of
from benchmarks.planning.tuning import MADE_FOR, START, STATIC, Changing, changing
from benchmarks.serve.processes import ROOT
from engine.config import EngineConfig
from tuner.goodput import attainment
from tuner.latency import LatencyModel
from tuner.plots import COLORS, LIMIT
from tuner.profile import load_profile
from wire.layout import KVLayout
from wire.types import Role

OUTPUT = ROOT / "docs" / "tuner-timeline.png"
MODEL = LatencyModel((3e-3, 9e-5, 5e-8), (2.5e-3, 9e-7, 1.9e-4), (2e-4, 1.5e-10))
LAYOUT = KVLayout(8, 2, 64, 16, "float32")
SAMPLED = 200
BIN_S = 2.0
WINDOW_S = 4.0
PRESSURES = (0.1, 0.2, 0.5, 1, 2, 5)
PREFILL, DECODE, BEST, KNOWN = COLORS[1], COLORS[4], COLORS[7], COLORS[5]


def made_up() -> Setup:
    engine = EngineConfig(
        block_size=LAYOUT.block_size,
        num_blocks=KV_BYTES // LAYOUT.block_bytes,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=512,
    )
    return Setup(START, engine, LAYOUT, MODEL)


@dataclass(frozen=True, slots=True)
class Runs:
    """The same load on three fleets."""

    load: Changing
    best: Split
    static: Simulated
    known: Simulated
    tuned: Simulated


def simulated(load: Changing) -> Runs:
    static = {split: load.static(split) for split in STATIC}
    best = max(static, key=lambda split: load.shares(static[split]).overall)
    return Runs(load, best, static[best], load.known(), load.tuned())


def draw(runs: Runs) -> Figure:
    """Four pictures below each other, over the same time."""
    figure = Figure(figsize=(8.4, 9.0), layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=(1.0, 1.0, 1.0, 1.2))
    end = 2 * runs.load.phase_s
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.set_xlim(0, end)
        panel.axvline(runs.load.phase_s, color="#888888", linewidth=1, linestyle=":")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    _draw_load(panels[0], runs.load, end)
    _draw_split(panels[1], runs, end)
    _draw_pressures(panels[2], runs.tuned)
    _draw_attainment(panels[3], runs, end)
    panels[3].set_xlabel("seconds")
    for panel in panels:
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    return figure


def _bins(end: float, width: float) -> list[float]:
    return [index * width for index in range(int(end / width))]


def _draw_load(panel: Axes, load: Changing, end: float) -> None:
    """Tokens of the requests that come, in thousands per second."""
    starts = _bins(end, BIN_S)
    for name, color in (("prompts", PREFILL), ("answers", DECODE)):
        sums = [0.0] * len(starts)
        for request in load.trace.requests:
            tokens = request.input_len if name == "prompts" else request.output_len
            sums[min(len(sums) - 1, int(request.at / BIN_S))] += tokens / BIN_S / 1e3
        panel.step(starts, sums, where="post", color=color, label=name)
    panel.set_ylabel("thousand\ntokens/s that come")
    panel.set_ylim(bottom=0)


def _draw_split(panel: Axes, runs: Runs, end: float) -> None:
    """Nodes of each role, from when they were asked on."""
    times, prefill = [0.0], [START.prefill]
    for move in runs.tuned.moves:
        times.append(move.at)
        prefill.append(prefill[-1] + (1 if move.role is Role.PREFILL else -1))
    times.append(end)
    prefill.append(prefill[-1])
    decode = [START.num_nodes - number for number in prefill]
    panel.step(times, prefill, where="post", color=PREFILL, linewidth=2, label="prefill nodes")
    panel.step(times, decode, where="post", color=DECODE, linewidth=2, label="decode nodes")
    panel.set_ylabel("the tuner's split")
    panel.set_ylim(0, START.num_nodes)


def _draw_pressures(panel: Axes, tuned: Simulated) -> None:
    times = [at for at, _ in tuned.looks]
    for name, color in (("prefill", PREFILL), ("decode", DECODE)):
        seen = [getattr(pressure, name) for _, pressure in tuned.looks]
        panel.plot(times, seen, color=color, label=f"of {name}")
    panel.axhline(1.0, color=LIMIT, linestyle="--", linewidth=1, label="limit")
    panel.set_yscale("log")
    panel.set_ylabel("pressure")
    panel.set_yticks(PRESSURES, [f"{value:g}" for value in PRESSURES])
    panel.set_ylim(bottom=0.08)
    panel.minorticks_off()


def _draw_attainment(panel: Axes, runs: Runs, end: float) -> None:
    """By the time at which requests came."""
    starts = _bins(end, WINDOW_S)
    for name, run, color, style in (
        ("the tuner", runs.tuned, COLORS[0], "-"),
        (f"static, {runs.best.prefill} + {runs.best.decode}", runs.static, BEST, "--"),
        ("known beforehand", runs.known, KNOWN, ":"),
    ):
        shares = []
        for start in starts:
            came = [r for r in run.records if start <= r.due < start + WINDOW_S]
            shares.append(attainment(came, runs.load.slo).good if came else float("nan"))
        overall = runs.load.shares(run).overall
        label = f"{name}: {overall:.0%}"
        panel.step(starts, shares, where="post", color=color, linestyle=style, label=label)
    panel.set_ylabel(f"share of requests\nwithin both limits, in {WINDOW_S:g} s")
    panel.set_ylim(0, 1.05)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, default=OUTPUT, metavar="FILE", help="PNG (%(default)s)")
    add("--profile", type=Path, metavar="FILE", help="of `baton profile` (a rounded one)")
    add("--phase-s", type=float, default=60.0, metavar="S", help="of each phase (%(default)g)")
    args = parser.parse_args()
    setup = made_up()
    if args.profile is not None:
        setup = setup_of(load_profile(args.profile), MADE_FOR[0])
    runs = simulated(changing(setup, SAMPLED, args.phase_s, print))
    for move in runs.tuned.moves:
        print(f"at {move.at:.0f} s {move.node} becomes {move.role.value}: {move.reason}")
    draw(runs).savefig(args.output, dpi=110)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
