"""`python -m router`: one router process."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from router.flags import add_arguments, from_args
from router.place import add_place_argument
from router.server import RouterServer, run
from telemetry.logs import set_up_logging
from wire.descriptors import allow_many
from wire.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a router with these flags; returns the exit code."""
    parser = make_parser()
    add_place_argument(parser)
    args = parser.parse_args(argv)
    set_up_logging("router" if args.place is None else f"router-{args.place.index}", args.log_level)
    try:
        config = from_args(args)
        if config.workers > 1 and config.place is None:
            raise ConfigError("several workers are started by `baton router --workers N`")
        allow_many()
        asyncio.run(run(config, _print_ready))
    except ConfigError as error:
        print(f"baton router: error: {error}", file=sys.stderr)
        return 1
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The flags of `baton router`."""
    parser = argparse.ArgumentParser(
        prog="baton router",
        description="Route OpenAI-style requests to prefill and decode nodes.",
    )
    add_arguments(parser)
    return parser


def _print_ready(server: RouterServer) -> None:
    """One line for the launcher and for scripts."""
    print(f"baton router ready http={server.http_url} control={server.control.url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
