"""One node as a router knows it: what it said of itself, and what was sent to it since."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp
from typing import NamedTuple

from router.cache_index import CacheIndex
from router.work import Work
from wire.fleet_messages import Register
from wire.types import NodeId, NodeLoad, Role


class Kind(NamedTuple):
    """What makes nodes alike: they differ in load and cache alone."""

    role: Role
    block_size: int
    num_blocks: int
    numerics: str


class Taken:
    """Seconds that prompts took of a node's streams, forgotten as the streams end."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._at = 0.0

    def lately_s(self, now: float, stream_s: float) -> float:
        return self._seconds * exp(-max(0.0, now - self._at) / stream_s)

    def add(self, seconds: float, now: float, stream_s: float) -> None:
        self._seconds = self.lately_s(now, stream_s) + seconds
        self._at = now


@dataclass(slots=True, eq=False)
class Node:
    """One registered life of a node."""

    id: NodeId
    info: Register
    cache: CacheIndex
    load: NodeLoad
    last_seen: float
    draining: bool = False
    stalled: bool = False
    reachable: bool = True  # the last message to it could be queued
    num_unreachable: int = 0  # heartbeats in a row that found no connection
    pending_blocks: int = 0
    assigned: dict[str, int] = field(default_factory=dict)  # request → prompt tokens not done
    pending_tokens: int = 0  # of all that are assigned
    taken: Taken = field(default_factory=Taken)  # of its streams, by prompts of this router
    queue: tuple[int, int, str] = (0, 0, "")  # how long a prompt waits here, among nodes alike
    room: tuple[int, int, str] = (0, 0, "")  # how full it is: blocks, negative where many are free

    @property
    def kind(self) -> Kind:
        info = self.info
        return Kind(info.role, self.block_size, self.load.blocks_total, info.model.numerics)

    @property
    def block_size(self) -> int:
        return max(1, self.info.layout.block_size)

    @property
    def max_context(self) -> int:
        """How long a request may become here: who generates must hold all of it."""
        if not self.info.role.receives:
            return self.info.model.max_model_len
        return min(
            self.info.model.max_model_len, self.info.num_blocks * self.info.layout.block_size
        )

    @property
    def kv_tokens(self) -> int:
        """What its blocks hold, of all requests together."""
        return self.info.num_blocks * self.block_size

    @property
    def serves(self) -> bool:
        """Whether it may get new work."""
        return self.reachable and not self.draining and not self.stalled

    def rank(self) -> None:
        """Its place among nodes that are alike follows from load and assignments."""
        load, order = self.load, (len(self.assigned), self.id.name)
        self.queue = (max(load.queued_tokens, self.pending_tokens), *order)
        self.room = (load.blocks_promised + self.pending_blocks - load.blocks_free, *order)

    def num_cached_tokens(self, work: Work, near: bool) -> int:
        """Of the prompt; all full blocks where another choice has just left them."""
        if near:
            return work.num_tokens // self.block_size * self.block_size
        if not len(self.cache):
            return 0
        hashes = work.block_hashes(self.info.model.fingerprint, self.block_size)
        return self.cache.num_cached_blocks(hashes) * self.block_size
