"""What the tuner knows of a fleet's nodes, and which of them it would move. Pure.

Mixed nodes are left alone: they serve either work as it comes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from router.fleet import Fleet
from router.fleet_node import Node
from tuner.observed import Standing
from wire.types import Role


def standing(fleet: Fleet, num_waiting: int) -> Standing:
    """The fleet now; `num_waiting` requests have no decode node yet."""
    serving = [node for node in fleet if node.serves]
    prefill = [node for node in serving if node.info.role is Role.PREFILL]
    decode = [node for node in serving if node.info.role is Role.DECODE]
    return Standing(
        num_prefill=len(prefill),
        num_decode=len(decode),
        queued_tokens=sum(map(_queued, prefill)),
        num_decoding=num_waiting + sum(n.load.num_running + n.load.num_waiting for n in decode),
        num_seats=_least(node.info.num_seats for node in serving),
        kv_tokens=_least(node.kv_tokens for node in serving),
    )


def to_move(
    fleet: Fleet, grow: Role, count: int, resting: Collection[str] = frozenset()
) -> list[Node]:
    """So many nodes of the other role, those that have least to do, and none called `resting`."""
    donor = Role.DECODE if grow is Role.PREFILL else Role.PREFILL
    nodes = [node for node in fleet if node.info.role is donor and node.serves]
    return [node for node in sorted(nodes, key=_work) if node.id.name not in resting][:count]


def _least(told: Iterable[int]) -> int:
    """Any of them may come to decode; 0: nobody tells."""
    return min(filter(None, told), default=0)


def _queued(node: Node) -> int:
    """The last heartbeat's word, or what was sent here since."""
    return max(node.load.queued_tokens, node.pending_tokens)


def _work(node: Node) -> tuple[int, str]:
    return node.load.queued_tokens + node.load.num_running, node.id.name
