"""What one of several routers on the same HTTP port knows of the others.

The launcher (`baton router --workers N`) starts the workers, keeps their ports, and sums up what
they tell about themselves. Each has a Unix socket in a folder that only this user can enter, and so
has the launcher: who is asked for `/metrics` on the shared port asks the launcher, which asks all.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """Which worker this is, where nodes find all of them, and where their sockets are.

    `returns`: it takes the place of one that died. The others can serve, and it cannot before the
    nodes have found it: so long it stays away from the shared port.
    """

    index: int
    folder: Path
    control_ports: tuple[int, ...]
    returns: bool = False

    @property
    def own_socket(self) -> Path:
        return self.folder / f"{self.index}.sock"

    @property
    def launcher_socket(self) -> Path:
        return self.folder / "all.sock"

    def flag(self) -> str:
        """The place as the flag that `add_place_argument` reads."""
        ports = ",".join(map(str, self.control_ports))
        return f"--place={self.index}:{ports}:{int(self.returns)}:{self.folder}"


def add_place_argument(parser: argparse.ArgumentParser) -> None:
    """For the launcher alone: not in `--help`."""
    parser.add_argument("--place", type=_place, help=argparse.SUPPRESS)


def _place(text: str) -> Place:
    index, ports, returns, folder = text.split(":", 3)
    control_ports = tuple(map(int, ports.split(",")))
    return Place(int(index), Path(folder), control_ports, returns == "1")
