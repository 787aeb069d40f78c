"""Who is in the fleet, who gets work, who waits: the pure parts around dispatch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.stub_node import LAYOUT, model_info
from router.admission import MAX_BLOCKED_S, MAX_PROBES, Admission
from router.breaker import Pair
from router.cache_index import CacheIndex
from router.errors import ApiError
from router.failures import Failures
from router.fleet import Fleet
from router.judge import Judge, Told
from router.pace import Pace
from router.placement import Handoff, InPlace, Nowhere
from router.policy import Candidate, Wishes, choose_decode, choose_prefill
from router.way import Mode, Rules
from router.work import Prompt, Work
from tuner.latency import LatencyModel
from wire.fleet_messages import CacheEvents, Register
from wire.prefix import block_hashes, root_hash
from wire.types import NodeId, NodeLoad, Pooling, Role, SamplingParams

A, B, C, D = (NodeId(name, 1) for name in "abcd")
MODEL = model_info(1000)
ANY = Wishes()
WORK = Work("r", Prompt(tuple(range(64))), SamplingParams(max_tokens=32))


def register(role: Role, **changes: object) -> Register:
    message = Register(role, MODEL, LAYOUT, 100, "tcp://a", (), "http://a")
    return replace(message, **changes)  # type: ignore[arg-type]


def new_fleet() -> Fleet:
    fleet = Fleet(node_timeout_s=3, node_stall_s=60)
    for node, role in ((A, Role.PREFILL), (B, Role.DECODE)):
        assert fleet.register(node, register(role), 0).refusal is None
    return fleet


def candidate(id: NodeId, **fields: int) -> Candidate:
    load = NodeLoad(blocks_total=100, blocks_free=fields.pop("free", 100))
    load = replace(load, blocks_promised=fields.pop("promised", 0))
    load = replace(load, queued_tokens=fields.pop("queued", 0))
    return Candidate(id=id, role=Role.MIXED, load=load, block_size=16, **fields)  # type: ignore[arg-type]


def id_of(chosen: Candidate | None) -> NodeId | None:
    return None if chosen is None else chosen.id


def test_ready_with_a_node_of_each_role() -> None:
    fleet = new_fleet()
    assert fleet.ready
    fleet.drain(B)
    assert not fleet.ready
    fleet.register(C, register(Role.DECODE), 0)
    assert fleet.ready
    assert fleet.pick_decode(WORK, A, ANY, ()) == C


def test_an_unreachable_node_gets_nothing_until_it_is_heard_again() -> None:
    fleet = new_fleet()
    fleet.mark_unreachable(B)
    assert not fleet.ready
    assert fleet.pick_decode(WORK, A, ANY, ()) is None
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=100), 1)
    assert fleet.pick_decode(WORK, A, ANY, ()) == B


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


def test_assigned_work_counts_until_it_is_done() -> None:
    fleet = new_fleet()
    fleet.register(C, register(Role.PREFILL), 0)
    assert fleet.pick_prefill(WORK, ANY) == A
    fleet.assign(A, "other", 500, 0)
    assert fleet.pick_prefill(WORK, ANY) == C
    fleet.unassign(A, "other")
    assert fleet.pick_prefill(WORK, ANY) == A


def test_blocks_asked_for_count_until_the_next_heartbeat() -> None:
    fleet = new_fleet()
    fleet.register(C, register(Role.DECODE), 0)
    fleet.assign(B, "other", 0, 50)
    assert fleet.pick_decode(WORK, A, ANY, ()) == C
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=100), 0)
    fleet.unassign(B, "other")
    assert fleet.pick_decode(WORK, A, ANY, ()) == B


def test_avoided_nodes_are_the_last_resort_and_refused_ones_none() -> None:
    fleet = new_fleet()
    assert fleet.pick_decode(WORK, A, Wishes({B}), ()) == B
    assert fleet.pick_decode(WORK, A, ANY, {B}) is None
    assert fleet.pick_prefill(WORK, Wishes({A})) == A


def four_nodes() -> Fleet:
    """A and C prefill, B and D decode; A and B are chosen where nothing speaks against it."""
    fleet = new_fleet()
    fleet.register(C, register(Role.PREFILL), 0)
    fleet.register(D, register(Role.DECODE), 0)
    return fleet


def open_up(fleet: Fleet, *pairs: Pair) -> None:
    for pair in pairs:
        assert [fleet.breaker.failed(pair, 0) for _ in range(3)] == [False, False, True]


def test_an_open_pair_is_passed_over_and_its_nodes_are_not() -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B))
    assert fleet.pick_prefill(WORK, ANY) == A
    assert fleet.pick_decode(WORK, A, ANY, ()) == D
    assert fleet.pick_decode(WORK, C, ANY, ()) == B
    assert fleet.pick_prefill(WORK, ANY, decode=B) == C
    assert fleet.pick_prefill(WORK, ANY, decode=D) == A


def test_a_prefill_node_whose_pairs_are_all_open_is_passed_over() -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B), Pair(A, D))
    assert fleet.pick_prefill(WORK, ANY) == C
    fleet.drain(C)
    assert fleet.pick_prefill(WORK, ANY) == A, "there is no other"
    assert fleet.pick_decode(WORK, A, ANY, ()) == B


def test_an_open_pair_is_taken_where_the_other_decode_nodes_have_refused() -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B))
    assert fleet.pick_decode(WORK, A, ANY, {D}) == B


def test_an_open_pair_is_better_than_a_node_that_failed_the_request() -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B))
    assert fleet.pick_decode(WORK, A, Wishes(avoid={D}), ()) == B
    assert fleet.pick_decode(WORK, A, Wishes(avoid={B}, avoid_pairs={Pair(A, D)}), ()) == D


def test_an_open_pair_is_tried_when_its_pause_is_over() -> None:
    fleet = four_nodes()
    open_up(fleet, Pair(A, B))
    later = Wishes(now=6)
    assert fleet.pick_decode(WORK, A, later, ()) == B
    fleet.breaker.began(Pair(A, B), 6)
    assert fleet.pick_decode(WORK, A, later, ()) == D


def test_a_choice_avoids_the_pair_that_failed_it() -> None:
    fleet = four_nodes()
    assert fleet.pick_decode(WORK, A, Wishes(avoid_pairs={Pair(A, B)}), ()) == D
    assert fleet.pick_prefill(WORK, Wishes(avoid_pairs={Pair(A, B), Pair(A, D)})) == C


def test_a_prefill_node_that_let_a_lease_expire_is_passed_over_whoever_would_receive() -> None:
    """Its other pairs have never failed; the pair alone would not keep it away."""
    fleet, failures = four_nodes(), Failures()
    assert fleet.pick_prefill(WORK, ANY) == A
    failures.count("expired", Pair(A, B))
    wishes = Wishes(failures.avoid, failures.pairs)
    assert fleet.pick_prefill(WORK, wishes) == C
    fleet.remove(C)
    assert fleet.pick_prefill(WORK, wishes) == A


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


def test_a_cached_prefix_attracts() -> None:
    fleet = new_fleet()
    fleet.register(C, register(Role.PREFILL), 0)
    hashes = block_hashes(WORK.prompt.tokens, 16, root_hash(MODEL.fingerprint))
    fleet[C].cache.apply(CacheEvents(1, tuple(hashes[:2]), snapshot=True))
    assert fleet.pick_prefill(WORK, ANY) == C
    salted = replace(WORK, prompt=Prompt(WORK.prompt.tokens, "another tenant"))
    assert fleet.pick_prefill(salted, ANY) == A


# ---------------------------------------------------------------- in place


def placed(
    fleet: Fleet,
    *refused: NodeId,
    work: Work = WORK,
    one_token: bool = False,
    now: float = 0.0,
) -> object:
    return fleet.place(work, replace(ANY, now=now), refused, one_token=one_token)


def fleet_of(judge: Judge | None = None, **roles: Role) -> Fleet:
    fleet = Fleet(node_timeout_s=3, node_stall_s=60, judge=judge)
    for name, role in roles.items():
        fleet.register(NodeId(name, 1), register(role), 0)
    return fleet


def test_a_prefill_and_a_decode_node_share_a_request() -> None:
    assert placed(new_fleet()) == Handoff(A, B)
    assert placed(new_fleet(), one_token=True) == Handoff(A, None)


def test_mixed_nodes_serve_alone_and_the_least_busy_first() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    assert placed(fleet) == InPlace(A)
    fleet.assign(A, "another", 100, 0)
    assert placed(fleet) == InPlace(B)
    assert placed(fleet, B) == InPlace(A)
    assert isinstance(placed(fleet, A, B), Nowhere)


def test_without_a_prefill_node_a_decode_node_serves_alone() -> None:
    fleet = new_fleet()
    fleet.drain(A)
    assert placed(fleet) == InPlace(B)
    assert placed(fleet, one_token=True) == InPlace(B)
    fleet.register(C, register(Role.MIXED), 0)
    assert placed(fleet) == InPlace(C), "who is there for it goes first"
    fleet.assign(C, "another", 10_000, 0)
    assert placed(fleet) == InPlace(C)


def test_room_comes_before_speed_in_place() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    fleet.heartbeat(A, NodeLoad(blocks_total=100, blocks_free=3), 1)
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=90, queued_tokens=5000), 1)
    assert placed(fleet) == InPlace(B)


def test_a_mixed_node_takes_what_a_prefill_node_sends() -> None:
    fleet = fleet_of(a=Role.PREFILL, b=Role.MIXED)
    assert placed(fleet) == Handoff(A, B)
    assert isinstance(placed(fleet, B), Nowhere)


PACE = Pace(LatencyModel((0.01, 1e-3, 0.0), (0.02, 0.0, 1e-3), (0.0, 0.0)), (0.01, 0.0), 2.0)


def test_a_busy_prefill_node_leaves_prompts_to_who_answers() -> None:
    for role in (Role.MIXED, Role.DECODE):
        fleet = fleet_of(Judge(Rules(), Told(PACE)), a=Role.PREFILL, b=role)
        for number in range(4):
            fleet.assign(B, f"stream {number}", 0, 0)
        assert placed(fleet) == Handoff(A, B)
        fleet.assign(A, "another", 5000, 0)
        assert placed(fleet) == InPlace(B)
        fleet.taken(B, 1.5, now=0.0)
        assert placed(fleet) == Handoff(A, B), "its streams have waited enough"
        assert placed(fleet, now=10.0) == InPlace(B), "and those have ended"


def test_what_a_moved_stream_has_said_is_computed_anew_too() -> None:
    """Its streams would wait for a long prompt, however short it was once."""
    fleet = fleet_of(Judge(Rules(), Told(PACE)), a=Role.PREFILL, b=Role.DECODE)
    fleet.assign(A, "another", 1900, 0)
    fleet.assign(B, "stream", 0, 0)
    assert placed(fleet) == InPlace(B)
    assert fleet.place(WORK, Wishes(num_output=1500), (), one_token=False) == Handoff(A, B)


def test_what_is_cached_where_it_is_answered_is_not_sent_again() -> None:
    fleet = fleet_of(Judge(Rules(), Told(None)), a=Role.PREFILL, b=Role.DECODE)
    assert placed(fleet) == Handoff(A, B)
    hashes = block_hashes(WORK.prompt.tokens, 16, root_hash(MODEL.fingerprint))
    fleet[B].cache.apply(CacheEvents(1, tuple(hashes), snapshot=True))
    assert placed(fleet) == InPlace(B)


def test_the_wish_for_handoffs_or_none_is_kept() -> None:
    always, never = (Judge(Rules(mode), Told(PACE)) for mode in (Mode.ALWAYS, Mode.NEVER))
    fleet = fleet_of(always, a=Role.PREFILL, b=Role.DECODE, c=Role.MIXED)
    fleet.assign(A, "another", 50_000, 0)
    assert placed(fleet) == Handoff(A, B)
    fleet = fleet_of(never, a=Role.PREFILL, b=Role.DECODE)
    assert placed(fleet) == InPlace(B)


def test_mixed_nodes_never_wait_for_each_others_blocks() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    assert fleet.pick_decode(WORK, A, ANY, ()) is None
    assert fleet.pick_prefill(WORK, ANY, decode=B) is None
    fleet.register(C, register(Role.DECODE), 0)
    assert fleet.pick_decode(WORK, A, ANY, ()) == C
    assert fleet.pick_prefill(WORK, ANY, decode=C) == A
    assert placed(fleet) == InPlace(A), "who has computed a prompt here goes on with it"


def test_embeddings_need_who_computes_for_others() -> None:
    embed = replace(WORK, pooling=Pooling.MEAN)
    assert placed(fleet_of(a=Role.MIXED), work=embed, one_token=True) == Handoff(A, None)
    assert isinstance(placed(fleet_of(a=Role.DECODE), work=embed, one_token=True), Nowhere)


def test_the_context_is_that_of_all_who_answer() -> None:
    fleet = fleet_of(a=Role.PREFILL, b=Role.MIXED)
    fleet.register(C, register(Role.MIXED, num_blocks=2), 0)
    assert fleet.model is not None
    assert fleet.model.max_model_len == 2 * LAYOUT.block_size


def test_a_pair_that_hands_over_badly_leaves_requests_to_one_node() -> None:
    fleet = fleet_of(Judge(Rules(), Told(None)), a=Role.PREFILL, b=Role.DECODE)
    assert placed(fleet) == Handoff(A, B)
    for wishes in (Wishes(avoid_pairs={Pair(A, B)}), Wishes(avoid={A})):
        assert fleet.place(WORK, wishes, (), one_token=False) == InPlace(B)
    for now in range(3):
        fleet.breaker.failed(Pair(A, B), now)
    assert placed(fleet) == InPlace(B)
    later = Wishes(now=60.0)
    assert fleet.place(WORK, later, (), one_token=False) == Handoff(A, B), "a trial"
    fleet.register(C, register(Role.DECODE), 60)
    assert fleet.place(WORK, Wishes(avoid_pairs={Pair(A, B)}), (), one_token=False) == Handoff(A, C)


# ---------------------------------------------------------------- policies


def test_prefill_weighs_queue_against_cache() -> None:
    idle, cached = candidate(A), candidate(B, num_cached_tokens=512, queued=400)
    assert id_of(choose_prefill([idle, cached], 1000)) == B
    assert id_of(choose_prefill([idle, candidate(B, num_cached_tokens=512, queued=600)], 1000)) == A
    assert id_of(choose_prefill([candidate(A, pending_tokens=10), candidate(B)], 10)) == B
    assert id_of(choose_prefill([], 10)) is None


def test_a_request_that_goes_on_prefers_equal_numerics() -> None:
    other = replace(candidate(A), same_numerics=False)
    busy = candidate(B, queued=900, free=20)
    assert id_of(choose_prefill([other, busy], 10)) == B
    assert id_of(choose_decode([other, busy], 160)) == B
    assert id_of(choose_decode([other, candidate(B, free=5)], 160)) == A, "room comes first"


def test_numerics_are_compared_with_those_of_who_wrote_last() -> None:
    fleet = new_fleet()
    fleet.register(C, register(Role.PREFILL, model=replace(MODEL, numerics="others")), 0)
    fleet.assign(A, "other", 500, 0)
    assert fleet.numerics_of(C) == "others"
    assert fleet.numerics_of(NodeId("unknown", 1)) == ""
    assert fleet.pick_prefill(WORK, ANY) == C
    assert fleet.pick_prefill(WORK, Wishes(numerics="others")) == C
    assert fleet.pick_prefill(WORK, Wishes(numerics=MODEL.numerics)) == A


def test_decode_prefers_room() -> None:
    assert id_of(choose_decode([candidate(A, free=50), candidate(B, free=60)], 160)) == B
    assert (
        id_of(choose_decode([candidate(A, free=60, promised=20), candidate(B, free=50)], 160)) == B
    )
    assert (
        id_of(choose_decode([candidate(A, free=60, pending_blocks=20), candidate(B, free=50)], 160))
        == B
    )
    assert id_of(choose_decode([candidate(A), candidate(B, num_cached_tokens=64)], 160)) == B
    assert id_of(choose_decode([], 10)) is None


def test_decode_takes_a_full_node_only_if_all_are() -> None:
    big, small = candidate(A, free=5), candidate(B, free=10)
    big = replace(big, load=replace(big.load, blocks_total=5))  # less in use, but too small
    assert id_of(choose_decode([big, small], 160)) == B
    assert id_of(choose_decode([big], 160)) == A


def test_ties_are_reproducible() -> None:
    assert id_of(choose_prefill([candidate(B), candidate(A)], 10)) == A
    assert id_of(choose_decode([candidate(A, num_assigned=1), candidate(B)], 10)) == B


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
