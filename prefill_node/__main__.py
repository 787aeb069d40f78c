"""`python -m prefill_node`: a prefill node for good; that of `baton prefill` can change roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from node import main as node_main
from wire.types import Role

if TYPE_CHECKING:
    from node.shell import NodeShell
    from prefill_node.role import PrefillRole


def main(argv: Sequence[str] | None = None) -> int:
    """Run a prefill node; returns the exit code."""
    return node_main.main(Role.PREFILL, {Role.PREFILL: make_role}, argv)


def make_role(shell: NodeShell) -> PrefillRole:
    """The role of this node. Imported late: it loads torch."""
    from prefill_node.role import PrefillRole

    return PrefillRole(shell)


if __name__ == "__main__":
    node_main.leave(main())
