"""The fleet as `/debug/fleet` tells it in JSON: this router's view, as old as the heartbeats."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from router.fleet import Fleet
from router.fleet_node import Node
from router.judge import Judge
from router.role_switch import RoleSwitch


def fleet_json(
    fleet: Fleet,
    judge: Judge,
    switches: Iterable[RoleSwitch],
    num_running: int,
    num_waiting: int,
    now: float,
    tuner: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All nodes by role and name, their last changes of role, the router's queue and tuner."""
    model = fleet.model
    nodes = sorted(fleet, key=lambda node: (node.info.role.value, node.id.name))
    return {
        "model": None if model is None else model.name,
        "max_model_len": None if model is None else model.max_model_len,
        "running": num_running,
        "waiting": num_waiting,
        "open_pairs": fleet.breaker.num_open,
        "handoff": _judge(judge),
        "nodes": [_node(node, now) for node in nodes],
        "role_switches": [switch_json(switch, now) for switch in switches],
        "tuner": tuner,
    }


def _judge(judge: Judge) -> dict[str, Any]:
    """How it is chosen between a handoff and serving in place, and what is known for it."""
    rules = judge.rules
    return {
        "mode": rules.mode.value,
        "slo": None if rules.slo is None else asdict(rules.slo),
        "pace": None if judge.pace is None else asdict(judge.pace),
    }


def switch_json(switch: RoleSwitch, now: float) -> dict[str, Any]:
    """One change of role; `return_s`: from the last request's end to the next registration."""
    ended = now if switch.ended is None else switch.ended
    return {
        "node": switch.node.name,
        "from": switch.old.value,
        "to": switch.new.value,
        "state": switch.state.value,
        "outcome": switch.outcome,
        "reason": switch.reason,
        "seconds": round(ended - switch.began, 3),
        "return_s": None if switch.return_s is None else round(switch.return_s, 3),
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
        "speculation": node.info.speculation,
        "load": asdict(node.load),
    }


def _state(node: Node) -> str:
    """The first of these that holds; only a serving node gets new work."""
    if not node.reachable:
        return "unreachable"
    if node.stalled:
        return "stalled"
    return "draining" if node.draining else "serving"
