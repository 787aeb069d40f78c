"""The fleet as `/debug/fleet` tells it in JSON: this router's view, as old as the heartbeats."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from router.fleet import Fleet, Node


def fleet_json(fleet: Fleet, num_running: int, num_waiting: int, now: float) -> dict[str, Any]:
    """All nodes by role and name, and the router's own queue."""
    model = fleet.model
    nodes = sorted(fleet, key=lambda node: (node.info.role.value, node.id.name))
    return {
        "model": None if model is None else model.name,
        "max_model_len": None if model is None else model.max_model_len,
        "running": num_running,
        "waiting": num_waiting,
        "open_pairs": fleet.breaker.num_open,
        "nodes": [_node(node, now) for node in nodes],
    }


def _node(node: Node, now: float) -> dict[str, Any]:
    return {
        "name": node.id.name,
        "id": str(node.id),
        "role": node.info.role.value,
        "state": _state(node),
        "heard_s": round(max(0.0, now - node.last_seen), 3),
        "assigned": len(node.assigned),
        "block_size": node.info.layout.block_size,
        "transports": [address.transport for address in node.info.transports],
        "numerics": node.info.model.numerics,
        "load": asdict(node.load),
    }


def _state(node: Node) -> str:
    """The first of these that holds; only a serving node gets new work."""
    if not node.reachable:
        return "unreachable"
    if node.stalled:
        return "stalled"
    return "draining" if node.draining else "serving"
