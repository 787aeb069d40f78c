"""The nodes that this router knows: who lives, what they hold, who may get work.

A node is (name, incarnation). A new incarnation ends all that the old one owned, and so does a new
registration of the same one: a node registers when it knows nothing of this router's requests.
Pure: no socket, and time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from router.breaker import Breaker, Pair
from router.cache_index import CacheIndex
from router.fleet_node import Node
from router.judge import Judge, Told
from router.placement import Handoff, Nowhere, Place, Ways, hands_over
from router.policy import Candidate, Wishes, choose_decode, choose_in_place, choose_prefill
from router.shortlist import Kind, by_kind, shortlist
from router.way import Mode, Rules
from router.work import Work
from wire.fleet_messages import ModelInfo, Register
from wire.types import NodeId, NodeLoad, Role

_MAX_INDEXED_BLOCKS = 1 << 18  # per node; about 20 MB of hashes
_MAX_SUPERSEDED = 1024


@dataclass(frozen=True, slots=True)
class Registration:
    """What came of a Register: refused with a reason, or taken; `lost` nodes are no more."""

    refusal: str | None = None
    lost: tuple[NodeId, ...] = ()


class Fleet:
    """All nodes of one router. One fleet serves one model."""

    def __init__(
        self, node_timeout_s: float, node_stall_s: float, judge: Judge | None = None
    ) -> None:
        self.judge = judge or Judge(Rules(Mode.ALWAYS), Told(None))
        self._timeout = node_timeout_s
        self._stall = node_stall_s
        self._nodes: dict[NodeId, Node] = {}
        self._superseded: OrderedDict[NodeId, None] = OrderedDict()
        self.breaker = Breaker()
        self._kinds: dict[Kind, list[Node]] | None = None  # None: to be found anew

    # ------------------------------------------------------------ who lives

    def register(self, node: NodeId, message: Register, now: float) -> Registration:
        """A node's first word."""
        refusal = self._refusal(node, message)
        if refusal is not None:
            return Registration(refusal)
        lost = tuple(other for other in self._nodes if other.name == node.name)
        for other in lost:
            self.remove(other)
            if other != node:
                self._mark_superseded(other)
        cache = CacheIndex(min(message.num_blocks, _MAX_INDEXED_BLOCKS))
        load = NodeLoad(blocks_total=message.num_blocks, blocks_free=message.num_blocks)
        self._nodes[node] = Node(node, message, cache, load, now)
        self._nodes[node].rank()
        self._kinds = None
        return Registration(lost=lost)

    def _refusal(self, node: NodeId, message: Register) -> str | None:
        if node in self._superseded:
            return f"another node has registered as {node.name!r} since; give each its own name"
        for other in self._nodes.values():
            if other.id.name == node.name:
                continue
            theirs, ours = message.model, other.info.model
            if theirs.fingerprint != ours.fingerprint:
                return (
                    f"this fleet serves model {ours.name!r} ({ours.fingerprint}, on {other.id}), "
                    f"this node has {theirs.name!r} ({theirs.fingerprint})"
                )
            if not message.layout.can_exchange(other.info.layout):
                return (
                    f"KV layouts do not fit: this node has {message.layout}; "
                    f"{other.id} has {other.info.layout}"
                )
        return None

    def _mark_superseded(self, node: NodeId) -> None:
        self._superseded[node] = None
        if len(self._superseded) > _MAX_SUPERSEDED:
            self._superseded.popitem(last=False)

    def heartbeat(self, node: NodeId, load: NodeLoad, now: float) -> bool:
        """Take over a node's load; True if it has just stalled, and its requests must move."""
        known = self._nodes[node]
        looked = known.serves, known.load.blocks_total
        known.load, known.last_seen, known.pending_blocks = load, now, 0
        known.rank()
        known.reachable = True
        was_stalled, known.stalled = known.stalled, load.stalled_s > self._stall
        if looked != (known.serves, load.blocks_total):
            self._kinds = None
        return known.stalled and not was_stalled

    def drain(self, node: NodeId) -> None:
        self._nodes[node].draining = True
        self._kinds = None

    def resume(self, node: NodeId) -> None:
        """It does not drain after all."""
        self._nodes[node].draining = False
        self._kinds = None

    def mark_unreachable(self, node: NodeId) -> None:
        """A message to it could not be queued: nothing new for it until it is heard again."""
        if node in self._nodes:
            self._nodes[node].reachable = False
            self._kinds = None

    def remove(self, node: NodeId) -> None:
        self._nodes.pop(node, None)
        self._kinds = None
        self.breaker.forget(node)

    def excuse(self, now: float) -> None:
        """The router itself was away: nobody's silence counts until now."""
        for node in self:
            node.last_seen = now

    def expire(self, now: float) -> list[NodeId]:
        """Remove and return the nodes whose heartbeat has stopped."""
        silent = [n.id for n in self._nodes.values() if now - n.last_seen > self._timeout]
        for node in silent:
            self.remove(node)
        return silent

    def __contains__(self, node: NodeId) -> bool:
        return node in self._nodes

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __getitem__(self, node: NodeId) -> Node:
        return self._nodes[node]

    # ------------------------------------------------------------ what they can do

    @property
    def model(self) -> ModelInfo | None:
        """The model that this fleet serves; its context is what every node can hold."""
        first = next(iter(self), None)
        if first is None:
            return None
        return replace(first.info.model, max_model_len=min(node.max_context for node in self))

    def num_serving(self, role: Role) -> int:
        return sum(node.info.role is role and node.serves for node in self)

    @property
    def kv_usage(self) -> float:
        """The share of blocks in use where requests are answered; cached ones are free."""
        loads = [node.load for node in self if node.info.role.receives]
        total = sum(load.blocks_total for load in loads)
        return sum(load.blocks_total - load.blocks_free for load in loads) / max(1, total)

    @property
    def ready(self) -> bool:
        """Whether a request could be served: who generates can compute its prompt too."""
        return any(node.serves and node.info.role.receives for node in self)

    # ------------------------------------------------------------ who gets work

    def numerics_of(self, node: NodeId) -> str:
        """Nodes with equal strings compute bit-equal results; empty: the node is not known."""
        return self._nodes[node].info.model.numerics if node in self._nodes else ""

    def place(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId], *, one_token: bool
    ) -> Place | Nowhere:
        """See router.placement.Placer."""
        if one_token and (prefill := self._best_sender(work, wishes)) is not None:
            return Handoff(prefill.id, None)
        if work.pooling is not None:
            return Nowhere("There is no prefill node to serve the request.")
        num_tokens = work.num_tokens + wishes.num_output
        place = self.judge.choose(self._ways(work, wishes, refused), num_tokens)
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
        if prefill not in self._nodes:
            return None
        sender = self._candidate(self._nodes[prefill], work, wishes)
        receivers = self._receivers(work, wishes, refused)
        best = self._best_receiver(sender, receivers, work, wishes)
        return None if best is None else best.id

    def _best_sender(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None, *, apart: bool = False
    ) -> Candidate | None:
        """`apart`: of those that generate nothing themselves."""
        only = self._nodes.get(decode) if decode is not None else None
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
        every = bool(wishes.avoid_pairs or len(self.breaker))
        return [
            (node.id, kind.role)
            for kind, alike in self._alike().items()
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
        pairs = (*wishes.avoid_pairs, *self.breaker)
        named = {*wishes.avoid, *wishes.near, *(node for pair in pairs for node in pair)}
        return [
            self._candidate(node, work, wishes)
            for kind, alike in self._alike().items()
            if wanted(kind.role)
            for node in shortlist(kind, _without(refused, alike), work, named)
        ]

    def _alike(self) -> dict[Kind, list[Node]]:
        """The nodes that serve, by kind."""
        if self._kinds is None:
            self._kinds = by_kind(node for node in self if node.serves)
        return self._kinds

    def _best_receiver(
        self, prefill: Candidate, receivers: Iterable[Candidate], work: Work, wishes: Wishes
    ) -> Candidate | None:
        def is_worse(receiver: Candidate) -> bool:
            return not self._is_good(Pair(prefill.id, receiver.id), wishes)

        nodes = [node for node in receivers if hands_over(prefill.role, node.role)]
        return choose_decode(_least_bad(nodes, wishes, is_worse), work.max_num_tokens)

    def _is_good(self, pair: Pair, wishes: Wishes) -> bool:
        return pair not in wishes.avoid_pairs and self.breaker.allows(pair, wishes.now)

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
            taken_s=node.taken.lately_s(wishes.now, self.judge.stream_s),
        )

    def num_to_compute(
        self, node: NodeId, work: Work, num_tokens: int, near: Collection[NodeId]
    ) -> int:
        """Of `num_tokens` tokens that begin with the prompt, those that the node must compute."""
        if node not in self._nodes:
            return num_tokens
        cached = self._nodes[node].num_cached_tokens(work, node in near)
        return num_tokens - min(cached, num_tokens - 1)

    def assign(self, node: NodeId, request: str, num_tokens: int, num_blocks: int) -> None:
        """Remember that this router gave `request` to `node`, until the next heartbeat tells."""
        known = self._nodes.get(node)
        if known is not None:
            known.pending_tokens += num_tokens - known.assigned.get(request, 0)
            known.assigned[request] = num_tokens
            known.pending_blocks += num_blocks
            known.rank()

    def taken(self, node: NodeId, seconds: float, now: float) -> None:
        """A prompt that was given to `node` takes so much of its streams' time."""
        known = self._nodes.get(node)
        if known is not None:
            known.taken.add(seconds, now, self.judge.stream_s)

    def unassign(self, node: NodeId, request: str) -> None:
        known = self._nodes.get(node)
        if known is not None:
            known.pending_tokens -= known.assigned.pop(request, 0)
            known.rank()


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
