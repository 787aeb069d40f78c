"""Which nodes serve a request: pure functions of a snapshot.

A prefill node costs the tokens it must compute before ours are done: its queue, plus what its
prefix cache lacks of our prompt. A decode node costs the share of its KV pool that will be in use:
what is promised, plus what its prefix cache lacks. A node that serves a request alone needs that
room, and costs tokens. The cheapest wins; ties go to the less busy node, then to the name, so that
a choice is reproducible. Before any cost come the wishes of a choice that has failed before, and
breakers (`breaker`): a pair that hands over badly is chosen only where there is no other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from router.breaker import Pair
from wire.types import NodeId, NodeLoad, Role


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a choice has learned for its next attempt; nothing of it is more than a preference.

    Args:
        avoid: nodes that failed it.
        avoid_pairs: pairs between which its blocks did not come through.
        numerics: of the node that produced its output so far; empty: there is none.
        now: breakers want to know.
        near: nodes that have its prompt's blocks, because another choice of its request put them
            there; whether their cache events have come yet or not.
        num_output: tokens that it has already: they are computed anew behind its prompt.
    """

    avoid: Collection[NodeId] = ()
    avoid_pairs: Collection[Pair] = ()
    numerics: str = ""
    now: float = 0.0
    near: Collection[NodeId] = ()
    num_output: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node as it looks for one request: its last heartbeat, and what this router sent since."""

    id: NodeId
    role: Role
    load: NodeLoad
    block_size: int
    block_bytes: int = 0
    num_cached_tokens: int = 0  # of this request's prompt
    pending_tokens: int = 0  # prompt tokens that this router sent here and that are not done
    pending_blocks: int = 0  # blocks that this router asked for since the node's last heartbeat
    num_assigned: int = 0  # choices of this router that run here
    same_numerics: bool = True  # computes bit-equally to who produced what the client has
    near: bool = False  # other choices of the request share this one's prompt there
    taken_s: float = 0.0  # that prompts took lately of its streams' time


def choose_prefill(candidates: Iterable[Candidate], num_tokens: int) -> Candidate | None:
    """The node that would finish a prompt of `num_tokens` first; None if there is none.

    Of a request that goes on, one with the same numerics: it repeats near-ties as they were.
    """
    return min(candidates, key=lambda node: _prefill_cost(node, num_tokens), default=None)


def choose_decode(candidates: Iterable[Candidate], max_num_tokens: int) -> Candidate | None:
    """The node that would have the most KV memory left; None if there is none.

    `max_num_tokens`: prompt and output together may grow to that. Choices of one request stay
    together as long as there is room: they share the prompt's blocks, and nothing is sent twice.
    """
    return min(candidates, key=lambda node: _decode_cost(node, max_num_tokens), default=None)


def choose_in_place(
    candidates: Iterable[Candidate], num_tokens: int, max_num_tokens: int
) -> Candidate | None:
    """The node that would finish a prompt first, of those with room to answer it too.

    A decode node only where there is no mixed one: it computes prompts between others' tokens.
    """

    def cost(node: Candidate) -> tuple[bool, bool, tuple[bool, int, int, str]]:
        no_room, *_ = _decode_cost(node, max_num_tokens)
        return no_room, node.role is not Role.MIXED, _prefill_cost(node, num_tokens)

    return min(candidates, key=cost, default=None)


def _prefill_cost(node: Candidate, num_tokens: int) -> tuple[bool, int, int, str]:
    queued = max(node.load.queued_tokens, node.pending_tokens)
    to_compute = num_tokens - min(node.num_cached_tokens, num_tokens)
    return not node.same_numerics, queued + to_compute, node.num_assigned, node.id.name


def _decode_cost(node: Candidate, max_num_tokens: int) -> tuple[bool, bool, bool, float, int, str]:
    new_tokens = max_num_tokens - min(node.num_cached_tokens, max_num_tokens)
    missing = -(-new_tokens // node.block_size)
    total = max(1, node.load.blocks_total)
    free = node.load.blocks_free - node.load.blocks_promised - node.pending_blocks
    in_use = (total - free + missing) / total
    place = (not node.near, not node.same_numerics)
    return missing > free, *place, in_use, node.num_assigned, node.id.name
