"""Nodes for the dispatch machine: who may be chosen, and the messages that they would send."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from router.breaker import Breaker, BreakerLimits, Pair
from router.dispatch import Dispatch, DispatchLimits
from router.placement import Handoff, InPlace, Nowhere, Place
from router.policy import Wishes
from router.work import Prompt, Work
from wire.layout import KVLayout
from wire.request_messages import Grant
from wire.types import FinishReason, NodeId, SamplingParams

P1, P2, P3, D1, D2, M1, M2 = (
    NodeId(name, 1) for name in ("p1", "p2", "p3", "d1", "d2", "m1", "m2")
)
LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
LIMITS = DispatchLimits(request_s=100, queue_s=10, reserve_s=2, silence_s=5)
PROMPT = (7, 8, 9)


@dataclass
class Nodes:
    """A placer: the first living node of each list that may be used."""

    prefill: list[NodeId] = field(default_factory=lambda: [P1, P2])
    decode: list[NodeId] = field(default_factory=lambda: [D1, D2])

    mixed: list[NodeId] = field(default_factory=list)

    numerics: list[str] = field(default_factory=list)  # that were asked for
    breaker: Breaker = field(default_factory=lambda: Breaker(BreakerLimits(failures=1)))

    @property
    def all(self) -> list[NodeId]:
        return [*self.prefill, *self.decode, *self.mixed]

    def numerics_of(self, node: NodeId) -> str:
        return f"as {node.name}"

    def place(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId], *, one_token: bool
    ) -> Place | Nowhere:
        """Handed over where there is a prefill node."""
        prefill = self.pick_prefill(work, wishes)
        if prefill is not None and one_token:
            return Handoff(prefill, None)
        decode = None if prefill is None else self.pick_decode(work, prefill, wishes, refused)
        if prefill is not None and decode is not None:
            return Handoff(prefill, decode)
        alone = _first([node for node in self.mixed if node not in refused], wishes.avoid)
        return Nowhere("There is no node.") if alone is None else InPlace(alone)

    def pick_prefill(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None
    ) -> NodeId | None:
        self.numerics.append(wishes.numerics)
        return _first(self.prefill, wishes.avoid)

    def pick_decode(
        self, work: Work, prefill: NodeId, wishes: Wishes, refused: Collection[NodeId]
    ) -> NodeId | None:
        self.numerics.append(wishes.numerics)
        pairs = [Pair(prefill, decode) for decode in self.decode if decode not in refused]
        paused = {p for p in pairs if not self.breaker.allows(p, wishes.now)}
        failed = {p.decode for p in pairs if p in wishes.avoid_pairs or p in paused}
        return _first([p.decode for p in pairs], {*wishes.avoid, *failed})


def _first(nodes: list[NodeId], avoid: Collection[NodeId]) -> NodeId | None:
    preferred = [node for node in nodes if node not in avoid]
    return next(iter(preferred or nodes), None)


def start(nodes: Nodes | None = None, max_tokens: int = 10, **sampling: Any) -> Dispatch:
    work = Work("r", Prompt(PROMPT), SamplingParams(max_tokens=max_tokens, **sampling))
    return Dispatch(work, nodes or Nodes(), LIMITS, now=0)


def grant(node: NodeId, lease: int = 1) -> Grant:
    secret = bytes(16)
    return Grant(lease, secret, secret, node, "u", (), KVLayout(1, 1, 1, 1, "float32"), (), 0, 1.0)
