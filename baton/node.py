"""`baton prefill`, `decode` and `mixed`: a node that begins with one role and can take the others.

The packages of prefill and decode know nothing of each other; only here do they come together.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from decode_node.__main__ import make_role as make_decode
from node import main as node_main
from node.main import MakeRoles
from prefill_node.__main__ import make_role as make_prefill
from wire.types import Role

if TYPE_CHECKING:
    from node.mixed_role import MixedRole
    from node.shell import NodeShell


def prefill(argv: Sequence[str]) -> int:
    """Run a node that begins as a prefill node; returns the exit code."""
    return _run(Role.PREFILL, argv)


def decode(argv: Sequence[str]) -> int:
    """Run a node that begins as a decode node; returns the exit code."""
    return _run(Role.DECODE, argv)


def mixed(argv: Sequence[str]) -> int:
    """Run a node that begins as a mixed one; returns the exit code."""
    return _run(Role.MIXED, argv)


def make_mixed(shell: NodeShell) -> MixedRole:
    """Both roles on one engine. Imported late: it loads torch."""
    from node.mixed_role import MixedRole

    return MixedRole(make_prefill(shell), make_decode(shell))


def main(argv: Sequence[str]) -> int:
    """The same, with the role as first argument: `python -m baton.node prefill …`."""
    return _run(Role(argv[0]), argv[1:])


def _run(role: Role, argv: Sequence[str]) -> int:
    makers: MakeRoles = {
        Role.PREFILL: make_prefill,
        Role.DECODE: make_decode,
        Role.MIXED: make_mixed,
    }
    return node_main.main(role, makers, argv)


if __name__ == "__main__":
    node_main.leave(main(sys.argv[1:]))
