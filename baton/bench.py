"""`baton bench`: any server over HTTP (tuner.bench), `baton bench engine`: the engine alone, and
`baton bench report`: plots of what was measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """examples:
  baton bench --concurrency 16 --num-requests 200 --input-len 512 --output-len 128 --ignore-eos
  baton bench --rate 4 --arrival poisson --duration 60 --ttft 500 --tpot 50 --html report.html
  baton bench --sweep 1 2 4 8 --num-requests 100 --ttft 500 --tpot 50 --json sweep.json
  baton bench --url http://host:8000 --trace azure.csv --length-scale 0.1 --rate-scale 0.5

others:
  baton bench report --help    plots of one or several JSON files in one HTML file
  baton bench engine --help    the engine of this machine alone, without a network
"""


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    if argv[:1] == ["engine"]:
        from baton import bench_engine  # loads torch: only where it is wanted

        parser = argparse.ArgumentParser(
            prog="baton bench engine", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        bench_engine.add_arguments(parser)
        return bench_engine.run(parser.parse_args(argv[1:]))
    from tuner import bench

    if argv[:1] == ["report"]:
        return _report(argv[1:])
    parser = argparse.ArgumentParser(
        prog="baton bench",
        description="Put load on any OpenAI-compatible server and report what its clients saw.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))


def _report(argv: Sequence[str]) -> int:
    from tuner.bench import run_report

    parser = argparse.ArgumentParser(
        prog="baton bench report",
        description="Draw results of `baton bench --json` beside each other into one HTML file.",
        epilog="example:\n  baton bench report before.json after.json -o both.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="runs or sweeps")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    args = parser.parse_args(argv)
    return run_report(args.results, args.output)
