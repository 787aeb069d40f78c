"""`baton serve`: a router and nodes of each role as processes on this machine.

On Ctrl-C or SIGTERM the fleet ends in order; a second one ends everything at once.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence

from baton.fleet_flags import add_fleet_arguments, check_model
from baton.launcher import Launcher, say
from router.flags import add_arguments as add_router_arguments


def main(argv: Sequence[str]) -> int:
    """Serve until stopped; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    check_model(args)
    return asyncio.run(serve(args))


def make_parser() -> argparse.ArgumentParser:
    """The flags of `baton serve`."""
    parser = argparse.ArgumentParser(
        prog="baton serve",
        description="""\
Serve a model on this machine: one router, prefill nodes and decode nodes, each a process; or
mixed nodes, each of which serves requests alone.
Without MODEL it serves the small Python-writing model that ships with Baton.

  baton serve
  baton serve ./my-model --prefill 1 --decode 2 --port 9000
  baton serve ./my-model --mixed 2
  baton serve ./my-model --flex 2""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fleet_arguments(parser)
    add_router_arguments(parser)
    parser.set_defaults(control_port=0)  # any free one: several fleets may share a machine
    return parser


async def serve(args: argparse.Namespace) -> int:
    """Start everything, print one line when ready, supervise until the end."""
    launcher = Launcher(args)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop_or_kill() -> None:
        if stopped.is_set():
            launcher.kill()
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_or_kill)
    run = asyncio.create_task(launcher.run())
    stop = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait((run, stop), return_when=asyncio.FIRST_COMPLETED)
        if run.done():
            return run.result()
        say("stopping")
        return 0
    finally:
        for task in (run, stop):
            task.cancel()
        await asyncio.gather(run, stop, return_exceptions=True)
        await launcher.stop()
