"""`python -m router`: one router process."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from router.config import add_arguments, from_args
from router.server import RouterServer, run
from telemetry.logs import set_up_logging
from wire.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router with these flags; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="baton router",
        description="Route OpenAI-style requests to prefill and decode nodes.",
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    set_up_logging("router", args.log_level)
    try:
        asyncio.run(run(from_args(args), _print_ready))
    except ConfigError as error:
        print(f"baton router: error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_ready(server: RouterServer) -> None:
    """One line for the launcher and for scripts."""
    print(f"baton router ready http={server.http_url} control={server.control.url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
