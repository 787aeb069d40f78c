"""`baton keygen`: makes the key file that all routers and nodes of a fleet share."""

from __future__ import annotations

import argparse
from pathlib import Path

from wire.fleet_key import make_key, write_key

_FILE_NAME = "fleet.key"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = f"""\
Make a fleet key: one secret file, the same on every machine of the fleet. Routers and nodes that
are started with it encrypt all that they say to each other, and hear nobody who does not have it.

  baton keygen                        writes ./{_FILE_NAME}
  scp -p {_FILE_NAME} host-b:            once per machine; keep mode 600
  baton router --key-file {_FILE_NAME} …
  baton decode --key-file {_FILE_NAME} …"""
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(_FILE_NAME),
        metavar="PATH",
        help=f"file to write, or a folder for {_FILE_NAME} (default: ./{_FILE_NAME})",
    )


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError where the file cannot be written or is there already."""
    path: Path = args.out / _FILE_NAME if args.out.is_dir() else args.out
    write_key(make_key(), path)
    print(
        f"wrote {path} (mode 600). Copy it to every machine of the fleet over a safe channel, and "
        f"start\neach router and node with --key-file {path}. Whoever has the file can join."
    )
    return 0
