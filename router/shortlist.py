"""Of many nodes, the few among which every choice for a request lies.

Of those alike (`Kind`), one that has nothing of the prompt can only win if nothing speaks against
it and it is the least busy: the others of its kind need no look. So a choice among a thousand nodes
costs a few cheap comparisons per node instead of a `Candidate` each, and comes out the same
(`tests/router/test_shortlist.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from operator import attrgetter

from router.fleet_node import Kind, Node
from router.work import Work
from wire.types import NodeId

FEW = 8  # of a kind are looked at one by one


def shortlist(
    kind: Kind, nodes: Sequence[Node], work: Work, named: Collection[NodeId]
) -> list[Node]:
    """Of serving nodes of one kind, those that may win.

    Args:
        named: nodes of which a wish, a refusal or a breaker speaks.
    """
    if len(nodes) <= FEW:
        return list(nodes)
    first = _first_block(kind, nodes, work)
    listed = [n for n in nodes if first in n.cache.hashes] if first else []
    if named:
        listed += [node for node in nodes if node.id in named]
    known = set(map(id, listed))
    rest = [node for node in nodes if id(node) not in known] if known else nodes
    return [*listed, *_least_busy(kind, rest, work)]


def _first_block(kind: Kind, nodes: Sequence[Node], work: Work) -> bytes | None:
    """Whoever lacks the first block has nothing of the prompt."""
    if not any(node.cache.hashes for node in nodes):
        return None  # nothing need be hashed
    hashes = work.block_hashes(nodes[0].info.model.fingerprint, kind.block_size)
    return hashes[0] if hashes else None


def _least_busy(kind: Kind, nodes: Sequence[Node], work: Work) -> Iterator[Node]:
    """Who computes a prompt first; and of those that also answer, who has the most room."""
    if not nodes:
        return
    if not kind.role.receives:
        yield min(nodes, key=_QUEUE)
        return
    roomiest = min(nodes, key=_ROOM)
    needed = -(-work.max_num_tokens // kind.block_size)
    yield roomiest
    first = min(nodes, key=_QUEUE)
    if -first.room[0] < needed:
        first = min((n for n in nodes if -n.room[0] >= needed), key=_QUEUE, default=first)
    if first is not roomiest:
        yield first


_QUEUE, _ROOM = attrgetter("queue"), attrgetter("room")
