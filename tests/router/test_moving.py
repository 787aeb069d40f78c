"""What the tuner is told of a fleet."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.stub_node import LAYOUT
from router.fleet import Fleet
from router.moving import standing
from tests.router.fleets import register
from tuner.observed import Standing
from wire.types import NodeId, NodeLoad, Role

BUSY = NodeLoad(blocks_total=100, num_running=5, num_waiting=2, queued_tokens=70)


def fleet_of(*kinds: tuple[Role, int, int]) -> Fleet:
    """Nodes of these roles, blocks and seats, all alike busy."""
    fleet = Fleet(node_timeout_s=3, node_stall_s=60)
    for number, (role, blocks, seats) in enumerate(kinds):
        node = NodeId(f"n{number}", 1)
        fleet.register(node, register(role, num_blocks=blocks, num_seats=seats), 0)
        fleet.heartbeat(node, replace(BUSY, blocks_total=blocks), 0)
    return fleet


def test_it_counts_what_is_on_the_nodes_and_what_waits_for_one() -> None:
    """Any node may come to decode: the smallest bounds count."""
    fleet = fleet_of((Role.PREFILL, 100, 32), (Role.PREFILL, 90, 64), (Role.DECODE, 100, 64))
    assert standing(fleet, num_waiting=4) == Standing(
        num_prefill=2,
        num_decode=1,
        queued_tokens=140,
        num_decoding=4 + 7,
        num_seats=32,
        kv_tokens=90 * LAYOUT.block_size,
    )


def test_nodes_that_get_no_work_and_mixed_ones_do_not_count_as_either() -> None:
    fleet = fleet_of((Role.PREFILL, 100, 0), (Role.DECODE, 100, 0), (Role.MIXED, 100, 0))
    fleet.drain(NodeId("n1", 1))
    told = standing(fleet, num_waiting=0)
    assert (told.num_prefill, told.num_decode, told.num_seats) == (1, 0, 0)
    assert (told.queued_tokens, told.num_decoding) == (70, 0)
