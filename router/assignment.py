"""Who works on one choice: the fleet is told at once, because heartbeats tell it only later."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from router.fleet import Fleet
from router.work import Work
from wire.types import NodeId


@dataclass(slots=True)
class Assignment:
    """The nodes that count `work` among their load; for a request in place they are one."""

    work: Work
    prefill: NodeId | None = None  # has the prompt to compute
    decode: NodeId | None = None  # answers

    def answers(self, fleet: Fleet, node: NodeId, *, counted: bool = False) -> None:
        """`node` has blocks for it, which the fleet may have `counted` already."""
        self.decode = node
        num_blocks = 0
        if node in fleet and not counted:
            num_blocks = fleet[node].info.layout.num_blocks(self.work.max_num_tokens)
        fleet.assign(node, self.work.request, 0, num_blocks)

    def computes(
        self, fleet: Fleet, node: NodeId, num_tokens: int, near: Collection[NodeId]
    ) -> None:
        """From the reservation on: else a burst that comes before the first grant goes to one."""
        self.prefill = node
        missing = fleet.num_to_compute(node, self.work, num_tokens, near)
        fleet.assign(node, self.work.request, missing, 0)

    def prompt_done(self, fleet: Fleet) -> None:
        """Who computed the prompt has no more of it to do; who answers alone goes on."""
        node, self.prefill = self.prefill, None
        if node is None:
            return
        if node == self.decode:
            fleet.assign(node, self.work.request, 0, 0)
        else:
            fleet.unassign(node, self.work.request)

    def end(self, fleet: Fleet) -> None:
        """Nobody works on it any more."""
        for node in (self.prefill, self.decode):
            if node is not None:
                fleet.unassign(node, self.work.request)
        self.prefill = self.decode = None
