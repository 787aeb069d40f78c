"""Who is in the fleet, what its caches hold, who waits: the pure parts around dispatch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.stub_node import LAYOUT
from router.admission import MAX_BLOCKED_S, MAX_PROBES, Admission
from router.breaker import Pair
from router.cache_index import CacheIndex
from router.errors import ApiError
from router.fleet import Fleet
from tests.router.fleets import (
    MODEL,
    A,
    B,
    C,
    fleet_of,
    four_nodes,
    new_fleet,
    open_up,
    register,
)
from wire.fleet_messages import CacheEvents
from wire.types import NodeId, NodeLoad, Role


def serving(fleet: Fleet) -> set[NodeId]:
    """Those that may get work."""
    return {node.id for nodes in fleet.alike().values() for node in nodes}


def test_ready_with_a_node_of_each_role() -> None:
    fleet = new_fleet()
    assert fleet.ready
    fleet.drain(B)
    assert not fleet.ready
    fleet.register(C, register(Role.DECODE), 0)
    assert fleet.ready
    assert serving(fleet) == {A, C}


def test_an_unreachable_node_gets_nothing_until_it_is_heard_again() -> None:
    fleet = new_fleet()
    fleet.mark_unreachable(B)
    assert not fleet.ready
    assert serving(fleet) == {A}
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=100), 1)
    assert serving(fleet) == {A, B}


def test_silence_is_death() -> None:
    fleet = new_fleet()
    fleet.heartbeat(A, NodeLoad(), 2)
    assert fleet.expire(3.1) == [B]
    assert B not in fleet
    assert fleet.expire(3.1) == []


def test_a_stalled_node_gets_nothing_until_it_moves() -> None:
    fleet = new_fleet()
    assert fleet.heartbeat(B, NodeLoad(stalled_s=61), 1)
    assert not fleet.heartbeat(B, NodeLoad(stalled_s=62), 2)  # told once
    assert not fleet.ready
    assert not fleet.heartbeat(B, NodeLoad(stalled_s=0), 3)
    assert fleet.ready


def test_a_new_life_ends_the_old_one() -> None:
    fleet = new_fleet()
    second = NodeId("b", 2)
    assert fleet.register(second, register(Role.DECODE), 0).lost == (B,)
    assert B not in fleet
    assert "another node has registered" in str(fleet.register(B, register(Role.DECODE), 0).refusal)
    assert fleet.register(second, register(Role.DECODE), 0).lost == (second,)  # it forgot us
    assert second in fleet


def test_nodes_that_do_not_fit_are_refused_with_both_sides_named() -> None:
    fleet = new_fleet()
    other = replace(MODEL, fingerprint="other-print", name="other")
    refusal = fleet.register(C, register(Role.DECODE, model=other), 0).refusal
    assert "other-print" in str(refusal)
    assert MODEL.fingerprint in str(refusal)
    layout = replace(LAYOUT, num_layers=LAYOUT.num_layers + 1)
    refusal = fleet.register(C, register(Role.DECODE, layout=layout), 0).refusal
    assert str(layout) in str(refusal)
    assert str(LAYOUT) in str(refusal)
    assert C not in fleet


def test_the_smallest_context_counts() -> None:
    fleet = new_fleet()
    fleet.register(C, register(Role.DECODE, model=replace(MODEL, max_model_len=77)), 0)
    assert fleet.model is not None
    assert fleet.model.max_model_len == 77
    fleet.register(NodeId("d", 1), register(Role.DECODE, num_blocks=3), 0)
    assert fleet.model.max_model_len == 3 * LAYOUT.block_size


def test_silence_does_not_count_while_the_router_was_away() -> None:
    fleet = new_fleet()
    fleet.excuse(100)
    assert fleet.expire(101) == []
    assert fleet.expire(104) == [A, B]


@pytest.mark.parametrize("way", ["leaves", "is silent", "is born again"])
def test_breakers_end_with_their_nodes(way: str) -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B))
    if way == "leaves":
        fleet.remove(B)
    elif way == "is silent":
        assert B in fleet.expire(100)
    else:
        fleet.register(NodeId(A.name, 2), register(Role.PREFILL), 0)
    assert fleet.breaker.num_open == 0


def test_the_context_is_that_of_all_who_answer() -> None:
    fleet = fleet_of(a=Role.PREFILL, b=Role.MIXED)
    fleet.register(C, register(Role.MIXED, num_blocks=2), 0)
    assert fleet.model is not None
    assert fleet.model.max_model_len == 2 * LAYOUT.block_size


# ---------------------------------------------------------------- cache events


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_cache_events_wait_for_a_snapshot_and_notice_gaps() -> None:
    index = CacheIndex(100)
    assert index.apply(CacheEvents(5, (digest(1),)))  # the snapshot is on its way
    assert len(index) == 0
    assert index.apply(CacheEvents(6, (digest(1), digest(2)), snapshot=True))
    assert index.apply(CacheEvents(7, (digest(3),), (digest(1),)))
    assert index.num_cached_blocks([digest(2), digest(3), digest(1)]) == 2
    assert not index.apply(CacheEvents(9, (digest(4),)))  # 8 was lost: ask
    assert index.apply(CacheEvents(10, (digest(5),)))  # asked already
    assert index.apply(CacheEvents(10, (digest(6),), snapshot=True))
    assert index.num_cached_blocks([digest(6)]) == 1
    assert index.num_cached_blocks([digest(2)]) == 0


def test_the_index_is_bounded() -> None:
    index = CacheIndex(10)
    index.apply(CacheEvents(0, tuple(map(digest, range(50))), snapshot=True))
    index.apply(CacheEvents(1, tuple(map(digest, range(50, 100)))))
    assert len(index) == 10


# ---------------------------------------------------------------- admission


def test_beyond_the_limit_one_waits_and_beyond_the_queue_one_is_refused() -> None:
    admission: Admission[str] = Admission(max_active=2, max_waiting=1)
    assert [admission.enter(key) for key in "abc"] == [True, True, False]
    with pytest.raises(ApiError) as caught:
        admission.check(1)
    assert caught.value.status == 429
    assert caught.value.headers() == {"Retry-After": "1"}
    assert admission.next(0) is None
    admission.leave("a")
    assert admission.next(0) == "c"
    assert (admission.num_active, admission.num_waiting) == (2, 0)
    admission.check(1)


def test_a_refused_one_keeps_its_place_and_blocks_the_others() -> None:
    admission: Admission[str] = Admission(10, 10)
    for key in "abc":
        admission.enter(key)
    admission.wait("c", 0, 60)
    admission.wait("a", 0, 60)
    assert not admission.enter("d")  # behind those who wait
    assert admission.next(MAX_BLOCKED_S / 2) is None
    assert [admission.next(MAX_BLOCKED_S + 1) for _ in range(4)] == ["a", "c", "d", None]


def test_only_a_few_ask_at_the_same_time() -> None:
    admission: Admission[int] = Admission(100, 100)
    admission.enter(0)
    admission.wait(0, 0, 0)
    for key in range(1, 10):
        admission.enter(key)
    asking = [admission.next(1) for _ in range(MAX_PROBES + 1)]
    assert asking == [*range(MAX_PROBES), None]
    admission.settle(0)
    assert admission.next(1) == MAX_PROBES


def test_whoever_leaves_is_forgotten_everywhere() -> None:
    admission: Admission[int] = Admission(1, 10)
    for key in range(3):
        admission.enter(key)
    for key in (1, 0, 2, 2):
        admission.leave(key)
    assert (admission.num_active, admission.num_waiting) == (0, 0)
    assert admission.next(0) is None
