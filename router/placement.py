"""Where a request is served: handed over from one node to another, or by one node alone.

`node_chooser` finds the best way of either kind, and `judge` chooses between the two. Who has
computed a prompt hands it over to a decode node or to a mixed one; a mixed node hands over to
decode nodes alone, so that no two nodes ever wait for each other's blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from router.policy import Candidate, Wishes
from router.way import Verdict
from router.work import Work
from wire.types import NodeId, Role


@dataclass(frozen=True, slots=True)
class Handoff:
    """One node computes the prompt, another one answers.

    Without a decode node the request ends with what the prefill node says: one token, an embedding.
    """

    prefill: NodeId
    decode: NodeId | None
    verdict: Verdict | None = field(default=None, compare=False)  # why, where there was a choice


@dataclass(frozen=True, slots=True)
class InPlace:
    """One node does everything."""

    node: NodeId
    verdict: Verdict | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Nowhere:
    """No node can take it now."""

    reason: str


Place: TypeAlias = Handoff | InPlace


@dataclass(frozen=True, slots=True)
class Ways:
    """The best of each kind, as far as there is one."""

    handoff: tuple[Candidate, Candidate] | None  # who computes the prompt, who answers
    in_place: Candidate | None
    failing: bool = False  # the handoff is a last resort: the best there is has failed


def hands_over(sender: Role, receiver: Role) -> bool:
    """Whether a node of one role may compute prompts for one of the other role."""
    both_mixed = sender is Role.MIXED and receiver is Role.MIXED
    return sender.sends and receiver.receives and not both_mixed


class Placer(Protocol):
    """Chooses nodes (`NodeChooser`; a script in tests)."""

    def numerics_of(self, node: NodeId) -> str:
        """Nodes with equal strings compute bit-equal results; empty: the node is not known."""
        ...

    def place(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId], *, one_token: bool
    ) -> Place | Nowhere:
        """Where to serve `work`, but for the nodes that have just `refused` it.

        With `one_token` left to produce, or an embedding, nothing has to be handed over.
        """
        ...

    def pick_prefill(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None
    ) -> NodeId | None: ...

    def pick_decode(
        self, work: Work, prefill: NodeId, wishes: Wishes, refused: Collection[NodeId]
    ) -> NodeId | None: ...
