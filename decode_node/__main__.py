"""`python -m decode_node`: a decode node for good; that of `baton decode` can change roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from node import main as node_main
from wire.types import Role

if TYPE_CHECKING:
    from decode_node.role import DecodeRole
    from node.shell import NodeShell


def main(argv: Sequence[str] | None = None) -> int:
    """Run a decode node; returns the exit code."""
    return node_main.main(Role.DECODE, {Role.DECODE: make_role}, argv)


def make_role(shell: NodeShell) -> DecodeRole:
    """The role of this node. Imported late: it loads torch."""
    from decode_node.role import DecodeRole

    return DecodeRole(shell)


if __name__ == "__main__":
    node_main.leave(main())
