"""`baton prefill` and `baton decode`: a node that begins with one role and can take the other.

Each role's own package knows nothing of the other; only here do they come together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from decode_node.__main__ import make_role as make_decode
from node import main as node_main
from node.main import MakeRoles
from prefill_node.__main__ import make_role as make_prefill
from wire.types import Role


def prefill(argv: Sequence[str]) -> int:
    """Run a node that begins as a prefill node; returns the exit code."""
    return _run(Role.PREFILL, argv)


def decode(argv: Sequence[str]) -> int:
    """Run a node that begins as a decode node; returns the exit code."""
    return _run(Role.DECODE, argv)


def main(argv: Sequence[str]) -> int:
    """The same, with the role as first argument: `python -m baton.node prefill …`."""
    return _run(Role(argv[0]), argv[1:])


def _run(role: Role, argv: Sequence[str]) -> int:
    makers: MakeRoles = {Role.PREFILL: make_prefill, Role.DECODE: make_decode}
    return node_main.main(role, makers, argv)


if __name__ == "__main__":
    node_main.leave(main(sys.argv[1:]))
