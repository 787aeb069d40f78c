"""The nodes that this router knows: who lives, what they can do, what they were given to do.

A node is (name, incarnation). A new incarnation ends all that the old one owned, and so does a new
registration of the same one: a node registers when it knows nothing of this router's requests.
Pure: no socket, and time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from router.breaker import Breaker
from router.cache_index import CacheIndex
from router.fleet_node import Kind, Node
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

    def __init__(self, node_timeout_s: float, node_stall_s: float) -> None:
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

    def get(self, node: NodeId) -> Node | None:
        return self._nodes.get(node)

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

    def alike(self) -> dict[Kind, list[Node]]:
        """The nodes that serve, by kind."""
        if self._kinds is None:
            self._kinds = {}
            for node in self:
                if node.serves:
                    self._kinds.setdefault(node.kind, []).append(node)
        return self._kinds

    # ------------------------------------------------------------ what they were given to do

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

    def unassign(self, node: NodeId, request: str) -> None:
        known = self._nodes.get(node)
        if known is not None:
            known.pending_tokens -= known.assigned.pop(request, 0)
            known.rank()
