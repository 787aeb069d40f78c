"""`baton bench`: any server over HTTP (tuner.bench), or `baton bench engine`: the engine alone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


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

    parser = argparse.ArgumentParser(
        prog="baton bench",
        description="measure any OpenAI-compatible server",
        epilog="`baton bench engine --help`: the engine of this machine alone, without a network",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(argv))
