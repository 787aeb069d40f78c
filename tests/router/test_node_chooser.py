"""Who gets work: the chooser over a fleet, and the policies that it asks."""

from __future__ import annotations

from dataclasses import replace

from router.breaker import Pair
from router.failures import Failures
from router.judge import Judge, Told
from router.node_chooser import NodeChooser
from router.pace import Pace
from router.placement import Handoff, InPlace, Nowhere
from router.policy import Wishes, choose_decode, choose_prefill
from router.way import Mode, Rules
from router.work import Prompt, Work
from tests.router.fleets import (
    MODEL,
    A,
    B,
    C,
    D,
    candidate,
    chooser_of,
    fleet_of,
    four_nodes,
    id_of,
    new_fleet,
    open_up,
    register,
)
from tuner.latency import LatencyModel
from wire.fleet_messages import CacheEvents
from wire.prefix import block_hashes, root_hash
from wire.types import NodeId, NodeLoad, Pooling, Role, SamplingParams

ANY = Wishes()
WORK = Work("r", Prompt(tuple(range(64))), SamplingParams(max_tokens=32))


def test_assigned_work_counts_until_it_is_done() -> None:
    fleet = new_fleet()
    chooser = chooser_of(fleet)
    fleet.register(C, register(Role.PREFILL), 0)
    assert chooser.pick_prefill(WORK, ANY) == A
    fleet.assign(A, "other", 500, 0)
    assert chooser.pick_prefill(WORK, ANY) == C
    fleet.unassign(A, "other")
    assert chooser.pick_prefill(WORK, ANY) == A


def test_blocks_asked_for_count_until_the_next_heartbeat() -> None:
    fleet = new_fleet()
    chooser = chooser_of(fleet)
    fleet.register(C, register(Role.DECODE), 0)
    fleet.assign(B, "other", 0, 50)
    assert chooser.pick_decode(WORK, A, ANY, ()) == C
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=100), 0)
    fleet.unassign(B, "other")
    assert chooser.pick_decode(WORK, A, ANY, ()) == B


def test_avoided_nodes_are_the_last_resort_and_refused_ones_none() -> None:
    chooser = chooser_of(new_fleet())
    assert chooser.pick_decode(WORK, A, Wishes({B}), ()) == B
    assert chooser.pick_decode(WORK, A, ANY, {B}) is None
    assert chooser.pick_prefill(WORK, Wishes({A})) == A


def test_an_open_pair_is_passed_over_and_its_nodes_are_not() -> None:
    fleet = four_nodes()
    chooser = chooser_of(fleet)
    open_up(fleet, Pair(A, B))
    assert chooser.pick_prefill(WORK, ANY) == A
    assert chooser.pick_decode(WORK, A, ANY, ()) == D
    assert chooser.pick_decode(WORK, C, ANY, ()) == B
    assert chooser.pick_prefill(WORK, ANY, decode=B) == C
    assert chooser.pick_prefill(WORK, ANY, decode=D) == A


def test_a_prefill_node_whose_pairs_are_all_open_is_passed_over() -> None:
    fleet = four_nodes()
    chooser = chooser_of(fleet)
    open_up(fleet, Pair(A, B), Pair(A, D))
    assert chooser.pick_prefill(WORK, ANY) == C
    fleet.drain(C)
    assert chooser.pick_prefill(WORK, ANY) == A, "there is no other"
    assert chooser.pick_decode(WORK, A, ANY, ()) == B


def test_an_open_pair_is_taken_where_the_other_decode_nodes_have_refused() -> None:
    fleet = four_nodes()
    chooser = chooser_of(fleet)
    open_up(fleet, Pair(A, B))
    assert chooser.pick_decode(WORK, A, ANY, {D}) == B


def test_an_open_pair_is_better_than_a_node_that_failed_the_request() -> None:
    fleet = four_nodes()
    chooser = chooser_of(fleet)
    open_up(fleet, Pair(A, B))
    assert chooser.pick_decode(WORK, A, Wishes(avoid={D}), ()) == B
    assert chooser.pick_decode(WORK, A, Wishes(avoid={B}, avoid_pairs={Pair(A, D)}), ()) == D


def test_an_open_pair_is_tried_when_its_pause_is_over() -> None:
    fleet = four_nodes()
    chooser = chooser_of(fleet)
    open_up(fleet, Pair(A, B))
    later = Wishes(now=6)
    assert chooser.pick_decode(WORK, A, later, ()) == B
    fleet.breaker.began(Pair(A, B), 6)
    assert chooser.pick_decode(WORK, A, later, ()) == D


def test_a_choice_avoids_the_pair_that_failed_it() -> None:
    chooser = chooser_of(four_nodes())
    assert chooser.pick_decode(WORK, A, Wishes(avoid_pairs={Pair(A, B)}), ()) == D
    assert chooser.pick_prefill(WORK, Wishes(avoid_pairs={Pair(A, B), Pair(A, D)})) == C


def test_a_prefill_node_that_let_a_lease_expire_is_passed_over_whoever_would_receive() -> None:
    """Its other pairs have never failed; the pair alone would not keep it away."""
    fleet, failures = four_nodes(), Failures()
    chooser = chooser_of(fleet)
    assert chooser.pick_prefill(WORK, ANY) == A
    failures.count("expired", Pair(A, B))
    wishes = Wishes(failures.avoid, failures.pairs)
    assert chooser.pick_prefill(WORK, wishes) == C
    fleet.remove(C)
    assert chooser.pick_prefill(WORK, wishes) == A


def test_a_cached_prefix_attracts() -> None:
    fleet = new_fleet()
    chooser = chooser_of(fleet)
    fleet.register(C, register(Role.PREFILL), 0)
    hashes = block_hashes(WORK.prompt.tokens, 16, root_hash(MODEL.fingerprint))
    fleet[C].cache.apply(CacheEvents(1, tuple(hashes[:2]), snapshot=True))
    assert chooser.pick_prefill(WORK, ANY) == C
    salted = replace(WORK, prompt=Prompt(WORK.prompt.tokens, "another tenant"))
    assert chooser.pick_prefill(salted, ANY) == A


# ---------------------------------------------------------------- in place


def placed(
    chooser: NodeChooser,
    *refused: NodeId,
    work: Work = WORK,
    one_token: bool = False,
    now: float = 0.0,
) -> object:
    return chooser.place(work, replace(ANY, now=now), refused, one_token=one_token)


def test_a_prefill_and_a_decode_node_share_a_request() -> None:
    assert placed(chooser_of(new_fleet())) == Handoff(A, B)
    assert placed(chooser_of(new_fleet()), one_token=True) == Handoff(A, None)


def test_mixed_nodes_serve_alone_and_the_least_busy_first() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    chooser = chooser_of(fleet)
    assert placed(chooser) == InPlace(A)
    fleet.assign(A, "another", 100, 0)
    assert placed(chooser) == InPlace(B)
    assert placed(chooser, B) == InPlace(A)
    assert isinstance(placed(chooser, A, B), Nowhere)


def test_without_a_prefill_node_a_decode_node_serves_alone() -> None:
    fleet = new_fleet()
    chooser = chooser_of(fleet)
    fleet.drain(A)
    assert placed(chooser) == InPlace(B)
    assert placed(chooser, one_token=True) == InPlace(B)
    fleet.register(C, register(Role.MIXED), 0)
    assert placed(chooser) == InPlace(C), "who is there for it goes first"
    fleet.assign(C, "another", 10_000, 0)
    assert placed(chooser) == InPlace(C)


def test_room_comes_before_speed_in_place() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    chooser = chooser_of(fleet)
    fleet.heartbeat(A, NodeLoad(blocks_total=100, blocks_free=3), 1)
    fleet.heartbeat(B, NodeLoad(blocks_total=100, blocks_free=90, queued_tokens=5000), 1)
    assert placed(chooser) == InPlace(B)


def test_a_mixed_node_takes_what_a_prefill_node_sends() -> None:
    chooser = chooser_of(fleet_of(a=Role.PREFILL, b=Role.MIXED))
    assert placed(chooser) == Handoff(A, B)
    assert isinstance(placed(chooser, B), Nowhere)


PACE = Pace(LatencyModel((0.01, 1e-3, 0.0), (0.02, 0.0, 1e-3), (0.0, 0.0)), (0.01, 0.0), 2.0)


def test_a_busy_prefill_node_leaves_prompts_to_who_answers() -> None:
    for role in (Role.MIXED, Role.DECODE):
        fleet = fleet_of(a=Role.PREFILL, b=role)
        chooser = chooser_of(fleet, Judge(Rules(), Told(PACE)))
        for number in range(4):
            fleet.assign(B, f"stream {number}", 0, 0)
        assert placed(chooser) == Handoff(A, B)
        fleet.assign(A, "another", 5000, 0)
        assert placed(chooser) == InPlace(B)
        chooser.taken(B, 1.5, now=0.0)
        assert placed(chooser) == Handoff(A, B), "its streams have waited enough"
        assert placed(chooser, now=10.0) == InPlace(B), "and those have ended"


def test_what_a_moved_stream_has_said_is_computed_anew_too() -> None:
    """Its streams would wait for a long prompt, however short it was once."""
    fleet = fleet_of(a=Role.PREFILL, b=Role.DECODE)
    chooser = chooser_of(fleet, Judge(Rules(), Told(PACE)))
    fleet.assign(A, "another", 1900, 0)
    fleet.assign(B, "stream", 0, 0)
    assert placed(chooser) == InPlace(B)
    assert chooser.place(WORK, Wishes(num_output=1500), (), one_token=False) == Handoff(A, B)


def test_what_is_cached_where_it_is_answered_is_not_sent_again() -> None:
    fleet = fleet_of(a=Role.PREFILL, b=Role.DECODE)
    chooser = chooser_of(fleet, Judge(Rules(), Told(None)))
    assert placed(chooser) == Handoff(A, B)
    hashes = block_hashes(WORK.prompt.tokens, 16, root_hash(MODEL.fingerprint))
    fleet[B].cache.apply(CacheEvents(1, tuple(hashes), snapshot=True))
    assert placed(chooser) == InPlace(B)


def test_the_wish_for_handoffs_or_none_is_kept() -> None:
    always, never = (Judge(Rules(mode), Told(PACE)) for mode in (Mode.ALWAYS, Mode.NEVER))
    fleet = fleet_of(a=Role.PREFILL, b=Role.DECODE, c=Role.MIXED)
    chooser = chooser_of(fleet, always)
    fleet.assign(A, "another", 50_000, 0)
    assert placed(chooser) == Handoff(A, B)
    fleet = fleet_of(a=Role.PREFILL, b=Role.DECODE)
    chooser = chooser_of(fleet, never)
    assert placed(chooser) == InPlace(B)


def test_mixed_nodes_never_wait_for_each_others_blocks() -> None:
    fleet = fleet_of(a=Role.MIXED, b=Role.MIXED)
    chooser = chooser_of(fleet)
    assert chooser.pick_decode(WORK, A, ANY, ()) is None
    assert chooser.pick_prefill(WORK, ANY, decode=B) is None
    fleet.register(C, register(Role.DECODE), 0)
    assert chooser.pick_decode(WORK, A, ANY, ()) == C
    assert chooser.pick_prefill(WORK, ANY, decode=C) == A
    assert placed(chooser) == InPlace(A), "who has computed a prompt here goes on with it"


def test_embeddings_need_who_computes_for_others() -> None:
    embed = replace(WORK, pooling=Pooling.MEAN)
    mixed, decode = chooser_of(fleet_of(a=Role.MIXED)), chooser_of(fleet_of(a=Role.DECODE))
    assert placed(mixed, work=embed, one_token=True) == Handoff(A, None)
    assert isinstance(placed(decode, work=embed, one_token=True), Nowhere)


def test_a_pair_that_hands_over_badly_leaves_requests_to_one_node() -> None:
    fleet = fleet_of(a=Role.PREFILL, b=Role.DECODE)
    chooser = chooser_of(fleet, Judge(Rules(), Told(None)))
    assert placed(chooser) == Handoff(A, B)
    for wishes in (Wishes(avoid_pairs={Pair(A, B)}), Wishes(avoid={A})):
        assert chooser.place(WORK, wishes, (), one_token=False) == InPlace(B)
    for now in range(3):
        fleet.breaker.failed(Pair(A, B), now)
    assert placed(chooser) == InPlace(B)
    later = Wishes(now=60.0)
    assert chooser.place(WORK, later, (), one_token=False) == Handoff(A, B), "a trial"
    fleet.register(C, register(Role.DECODE), 60)
    wishes = Wishes(avoid_pairs={Pair(A, B)})
    assert chooser.place(WORK, wishes, (), one_token=False) == Handoff(A, C)


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
    chooser = chooser_of(fleet)
    fleet.register(C, register(Role.PREFILL, model=replace(MODEL, numerics="others")), 0)
    fleet.assign(A, "other", 500, 0)
    assert chooser.numerics_of(C) == "others"
    assert chooser.numerics_of(NodeId("unknown", 1)) == ""
    assert chooser.pick_prefill(WORK, ANY) == C
    assert chooser.pick_prefill(WORK, Wishes(numerics="others")) == C
    assert chooser.pick_prefill(WORK, Wishes(numerics=MODEL.numerics)) == A


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
