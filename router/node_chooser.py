"""Who gets work: of the nodes that serve, those that a request goes to.

Each node becomes a `Candidate` of the request, as far as it may win (`shortlist`). Of these
`policy` tells the best of each kind, and the judge chooses between a handoff and serving in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from router.breaker import Pair
from router.fleet import Fleet
from router.fleet_node import Node
from router.judge import Judge
from router.placement import Handoff, Nowhere, Place, Ways, hands_over
from router.policy import Candidate, Wishes, choose_decode, choose_in_place, choose_prefill
from router.shortlist import shortlist
from router.work import Work
from wire.types import NodeId, Role


class NodeChooser:
    """The `Placer` of one router."""

    def __init__(self, fleet: Fleet, judge: Judge) -> None:
        self._fleet = fleet
        self._judge = judge

    def numerics_of(self, node: NodeId) -> str:
        """Nodes with equal strings compute bit-equal results; empty: the node is not known."""
        known = self._fleet.get(node)
        return "" if known is None else known.info.model.numerics

    def place(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId], *, one_token: bool
    ) -> Place | Nowhere:
        """See router.placement.Placer."""
        if one_token and (prefill := self._best_sender(work, wishes)) is not None:
            return Handoff(prefill.id, None)
        if work.pooling is not None:
            return Nowhere("There is no prefill node to serve the request.")
        num_tokens = work.num_tokens + wishes.num_output
        place = self._judge.choose(self._ways(work, wishes, refused), num_tokens)
        return place or Nowhere("There is no decode node to serve the request.")

    def _ways(self, work: Work, wishes: Wishes, refused: Collection[NodeId]) -> Ways:
        """Who has computed a prompt in place goes on with it: others hand over."""
        receivers = self._receivers(work, wishes, refused)
        candidates = _least_bad(receivers, wishes, lambda node: False)
        alone = choose_in_place(candidates, work.num_tokens, work.max_num_tokens)
        prefill = self._best_sender(work, wishes, apart=alone is not None)
        decode = None if prefill is None else self._best_receiver(prefill, receivers, work, wishes)
        if prefill is None or decode is None:
            return Ways(None, alone)
        good = self._is_good(Pair(prefill.id, decode.id), wishes) and prefill.id not in wishes.avoid
        return Ways((prefill, decode), alone, failing=not good)

    def pick_prefill(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None
    ) -> NodeId | None:
        """The best node that can hand over to `decode` (None: to any)."""
        best = self._best_sender(work, wishes, decode)
        return None if best is None else best.id

    def pick_decode(
        self, work: Work, prefill: NodeId, wishes: Wishes, refused: Collection[NodeId]
    ) -> NodeId | None:
        """The best node for what `prefill` will send that has not refused."""
        known = self._fleet.get(prefill)
        if known is None:
            return None
        sender = self._candidate(known, work, wishes)
        receivers = self._receivers(work, wishes, refused)
        best = self._best_receiver(sender, receivers, work, wishes)
        return None if best is None else best.id

    def taken(self, node: NodeId, seconds: float, now: float) -> None:
        """A prompt that was given to `node` takes so much of its streams' time."""
        known = self._fleet.get(node)
        if known is not None:
            known.taken.add(seconds, now, self._judge.stream_s)

    def _best_sender(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None, *, apart: bool = False
    ) -> Candidate | None:
        """`apart`: of those that generate nothing themselves."""
        only = self._fleet.get(decode) if decode is not None else None
        if decode is not None and only is None:
            return None
        candidates = self._candidates(
            lambda role: (
                role.sends
                and not (apart and role.receives)
                and (only is None or hands_over(role, only.info.role))
            ),
            work,
            wishes,
        )
        partners = self._partners(wishes) if only is None else [(only.id, only.info.role)]

        def is_worse(sender: Candidate) -> bool:
            pairs = (Pair(sender.id, id) for id, role in partners if hands_over(sender.role, role))
            return not any(self._is_good(pair, wishes) for pair in pairs)

        return choose_prefill(_least_bad(candidates, wishes, is_worse), work.num_tokens)

    def _partners(self, wishes: Wishes) -> list[tuple[NodeId, Role]]:
        """Whom somebody could hand over to; one of a kind, where no pair is doubted."""
        every = bool(wishes.avoid_pairs or len(self._fleet.breaker))
        return [
            (node.id, kind.role)
            for kind, alike in self._fleet.alike().items()
            if kind.role.receives
            for node in (alike if every else alike[:1])
        ]

    def _receivers(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId]
    ) -> list[Candidate]:
        return self._candidates(lambda role: role.receives, work, wishes, refused)

    def _candidates(
        self,
        wanted: Callable[[Role], bool],
        work: Work,
        wishes: Wishes,
        refused: Collection[NodeId] = (),
    ) -> list[Candidate]:
        """Serving nodes of the wanted roles, but for those that cannot win."""
        pairs = (*wishes.avoid_pairs, *self._fleet.breaker)
        named = {*wishes.avoid, *wishes.near, *(node for pair in pairs for node in pair)}
        return [
            self._candidate(node, work, wishes)
            for kind, alike in self._fleet.alike().items()
            if wanted(kind.role)
            for node in shortlist(kind, _without(refused, alike), work, named)
        ]

    def _best_receiver(
        self, prefill: Candidate, receivers: Iterable[Candidate], work: Work, wishes: Wishes
    ) -> Candidate | None:
        def is_worse(receiver: Candidate) -> bool:
            return not self._is_good(Pair(prefill.id, receiver.id), wishes)

        nodes = [node for node in receivers if hands_over(prefill.role, node.role)]
        return choose_decode(_least_bad(nodes, wishes, is_worse), work.max_num_tokens)

    def _is_good(self, pair: Pair, wishes: Wishes) -> bool:
        return pair not in wishes.avoid_pairs and self._fleet.breaker.allows(pair, wishes.now)

    def _candidate(self, node: Node, work: Work, wishes: Wishes) -> Candidate:
        near = bool(wishes.near) and node.id in wishes.near
        return Candidate(
            id=node.id,
            role=node.info.role,
            load=node.load,
            block_size=node.block_size,
            block_bytes=node.info.layout.block_bytes,
            num_cached_tokens=node.num_cached_tokens(work, near),
            pending_tokens=node.pending_tokens,
            pending_blocks=node.pending_blocks,
            num_assigned=len(node.assigned),
            same_numerics=wishes.numerics in ("", node.info.model.numerics),
            near=near,
            taken_s=node.taken.lately_s(wishes.now, self._judge.stream_s),
        )


def _without(refused: Collection[NodeId], nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.id not in refused] if refused else nodes


def _least_bad(
    nodes: list[Candidate], wishes: Wishes, is_worse: Callable[[Candidate], bool]
) -> list[Candidate]:
    """Those that least speaks against: that the choice avoids the node weighs most."""
    avoid = wishes.avoid or ()  # to look into an empty set hashes too
    against = [(node.id in avoid, is_worse(node)) for node in nodes]
    least = min(against, default=None)
    return [node for node, bad in zip(nodes, against, strict=True) if bad == least]
