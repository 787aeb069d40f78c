"""Small fleets that nobody serves, candidates, and the chooser over them."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.stub_node import LAYOUT, model_info
from router.breaker import Pair
from router.fleet import Fleet
from router.judge import Judge, Told
from router.node_chooser import NodeChooser
from router.policy import Candidate
from router.way import Mode, Rules
from wire.fleet_messages import Register
from wire.types import NodeId, NodeLoad, Role

A, B, C, D = (NodeId(name, 1) for name in "abcd")
MODEL = model_info(1000)


def register(role: Role, **changes: object) -> Register:
    message = Register(role, MODEL, LAYOUT, 100, "tcp://a", (), "http://a")
    return replace(message, **changes)  # type: ignore[arg-type]


def fleet_of(**roles: Role) -> Fleet:
    fleet = Fleet(node_timeout_s=3, node_stall_s=60)
    for name, role in roles.items():
        assert fleet.register(NodeId(name, 1), register(role), 0).refusal is None
    return fleet


def new_fleet() -> Fleet:
    return fleet_of(a=Role.PREFILL, b=Role.DECODE)


def four_nodes() -> Fleet:
    """A and C prefill, B and D decode; A and B are chosen where nothing speaks against it."""
    fleet = new_fleet()
    fleet.register(C, register(Role.PREFILL), 0)
    fleet.register(D, register(Role.DECODE), 0)
    return fleet


def open_up(fleet: Fleet, *pairs: Pair) -> None:
    for pair in pairs:
        assert [fleet.breaker.failed(pair, 0) for _ in range(3)] == [False, False, True]


def chooser_of(fleet: Fleet, judge: Judge | None = None) -> NodeChooser:
    """One that hands over where it can, unless a judge is given."""
    return NodeChooser(fleet, judge or Judge(Rules(Mode.ALWAYS), Told(None)))


def candidate(id: NodeId, **fields: int) -> Candidate:
    load = NodeLoad(blocks_total=100, blocks_free=fields.pop("free", 100))
    load = replace(load, blocks_promised=fields.pop("promised", 0))
    load = replace(load, queued_tokens=fields.pop("queued", 0))
    return Candidate(id=id, role=Role.MIXED, load=load, block_size=16, **fields)  # type: ignore[arg-type]


def id_of(chosen: Candidate | None) -> NodeId | None:
    return None if chosen is None else chosen.id
