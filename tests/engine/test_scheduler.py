"""What each step computes: order, budget, fairness, admission, preemption. No model, no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.plan import RequestProgress, StepPlan
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.scheduler import Scheduler
from wire.errors import CapacityError, ConfigError
from wire.types import BlockHandle, FinishReason, SamplingParams

EOS = 1


class Bench:
    """A scheduler whose every sampled token is `token`."""

    def __init__(
        self,
        *,
        num_blocks: int = 200,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 16,
        kv_overcommit: float = 1.0,
        max_num_waiting: int = 100,
        long_prefill_token_threshold: int = 0,
    ) -> None:
        self.config = EngineConfig(
            block_size=4,
            num_blocks=num_blocks,
            max_model_len=256,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_overcommit=kv_overcommit,
            max_num_waiting=max_num_waiting,
            long_prefill_token_threshold=long_prefill_token_threshold,
        )
        self.pool = BlockPool(num_blocks, epoch=1)
        self.cache = PrefixCache(self.pool, 4, "model")
        self.scheduler = Scheduler(self.config, self.pool, self.cache, frozenset([EOS]))
        self.num_preempted = 0

    def add(
        self, name: str, num_tokens: int, max_tokens: int = 100, prefill_only: bool = False
    ) -> Request:
        """A request whose prompt begins with its own name, so that prompts differ."""
        tokens = [*(ord(c) for c in name.ljust(4)), *range(num_tokens - 4)]
        return self.add_tokens(name, tokens, max_tokens, prefill_only)

    def add_tokens(
        self, name: str, tokens: Sequence[int], max_tokens: int = 100, prefill_only: bool = False
    ) -> Request:
        request = make_request(name, tokens, max_tokens, prefill_only)
        self.scheduler.add(request)
        return request

    def step(self, token: int = 5) -> dict[str, int]:
        """Run one step; how many tokens it computed for each request, in batch order."""
        plan = self.scheduler.plan()
        self.commit(plan, token)
        return {item.request.request_id: item.num_new_tokens for item in plan.scheduled}

    def commit(self, plan: StepPlan, token: int = 5) -> tuple[RequestProgress, ...]:
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        self.num_preempted += plan.num_preempted
        progress = self.scheduler.commit(plan, [token] * len(plan.sampling))
        self.scheduler.check_integrity()
        return progress


def make_request(
    name: str, tokens: Sequence[int], max_tokens: int = 100, prefill_only: bool = False
) -> Request:
    return Request(
        request_id=name,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_tokens=max_tokens),
        max_num_tokens=256,
        prefill_only=prefill_only,
    )


# ------------------------------------------------------------ order and budget


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    bench = Bench()
    bench.add("long", 40)
    assert [bench.step() for _ in range(4)] == [
        {"long": 16},
        {"long": 16},
        {"long": 8},
        {"long": 1},
    ]


def test_decodes_come_first_and_prefills_get_the_rest() -> None:
    bench = Bench()
    bench.add("long", 60)
    bench.step()
    bench.add("b", 4)
    while bench.scheduler.load(0).num_waiting:
        bench.step()
    bench.add("next", 60)
    assert list(bench.step().items()) == [("long", 1), ("b", 1), ("next", 14)]
    assert list(bench.step().items()) == [("long", 1), ("b", 1), ("next", 14)]


def test_a_decode_does_not_wait_for_an_older_prefill() -> None:
    bench = Bench()
    bench.add("long", 60)
    bench.step()
    bench.scheduler.adopt(reserve(bench, range(10), 14), adopted("r", range(10)))
    assert list(bench.step().items()) == [("r", 1), ("long", 15)]


def test_a_waiting_request_shares_the_step_with_a_chunk() -> None:
    bench = Bench()
    bench.add("a", 10)
    bench.add("b", 10)
    assert bench.step() == {"a": 10, "b": 6}
    assert bench.step() == {"a": 1, "b": 4}


def test_decodes_do_not_starve_a_prefill() -> None:
    """Seats never exceed the budget: the third decode waits, else the prefill would get nothing."""
    bench = Bench(max_num_seqs=50, max_num_batched_tokens=3)
    bench.add("long", 60)
    bench.step()
    for start in (100, 200, 300):
        tokens = range(start, start + 4)
        bench.scheduler.adopt(reserve(bench, tokens, 8), adopted(f"r{start}", tokens))
    assert bench.step() == {"r100": 1, "r200": 1, "long": 1}


def test_first_come_first_served_without_overtaking_who_does_not_fit() -> None:
    bench = Bench(num_blocks=10)
    bench.add("a", 16, max_tokens=9)  # 6 blocks
    bench.add("b", 16, max_tokens=9)  # does not fit beside a
    bench.add("c", 4, max_tokens=1)  # would
    assert bench.step() == {"a": 16}
    assert bench.step() == {"a": 1}
    assert bench.scheduler.load(0).num_waiting == 2


def test_finished_requests_make_room() -> None:
    bench = Bench(num_blocks=10)
    bench.add("a", 16, max_tokens=2)
    bench.add("b", 16, max_tokens=9)
    bench.add("c", 16, max_tokens=9)
    assert bench.step() == {"a": 16}
    assert bench.step() == {"a": 1}
    assert bench.step() == {"b": 16}


# ------------------------------------------------------------ prefixes


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench()
    bench.add_tokens("a", range(14), max_tokens=1)
    bench.step()
    b = bench.add_tokens("b", [*range(12), 99, 98], max_tokens=1)
    assert bench.step() == {"b": 2}
    assert b.num_cached_tokens == 12


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    """In a copy of the last block, as the other one's is not to be written to."""
    bench = Bench()
    bench.add_tokens("a", range(12), max_tokens=1)
    bench.step()
    b = bench.add_tokens("b", range(12), max_tokens=1)
    assert bench.step() == {"b": 1}
    assert b.num_cached_tokens == 11


def test_a_prefix_that_is_being_computed_is_waited_for_and_others_pass() -> None:
    bench = Bench(max_num_batched_tokens=32)
    bench.add_tokens("a", range(14))
    b = bench.add_tokens("b", [*range(12), 99, 98])
    bench.add_tokens("c", [7, 7, 7, 7, 7])
    assert bench.step() == {"a": 14, "c": 5}
    assert bench.step() == {"a": 1, "c": 1, "b": 2}
    assert b.num_cached_tokens == 12


def test_waiting_for_a_prefix_ends_when_its_computer_is_aborted() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add_tokens("a", range(40))
    bench.add_tokens("b", range(40))
    assert bench.step() == {"a": 8}
    assert bench.scheduler.abort("a")
    assert bench.step() == {"b": 8}


# ------------------------------------------------------------ admission and preemption


def test_admission_counts_predicted_growth() -> None:
    bench = Bench(num_blocks=20)
    bench.add("a", 8, max_tokens=41)  # 48 slots: 12 blocks
    bench.add("b", 8, max_tokens=41)
    assert bench.step() == {"a": 8}
    load = bench.scheduler.load(step=1)
    assert load.blocks_free == 18
    assert load.blocks_promised == 10
    assert (load.num_running, load.num_waiting, load.queued_tokens) == (1, 1, 8)


def test_without_overcommit_nothing_is_ever_preempted() -> None:
    bench = Bench(num_blocks=20)
    for i in range(6):
        bench.add(f"r{i}", 8, max_tokens=41)
    while bench.scheduler.has_work:
        bench.step()
        load = bench.scheduler.load(0)
        assert load.blocks_promised <= load.blocks_free
    assert bench.num_preempted == 0


def test_with_overcommit_the_newest_is_preempted_and_all_finish_in_order() -> None:
    bench = Bench(num_blocks=14, kv_overcommit=4.0)
    requests = [bench.add(f"r{i}", 8, max_tokens=41) for i in range(4)]
    finished: list[str] = []
    while bench.scheduler.has_work:
        bench.step()
        finished += [
            r.request_id for r in requests if r.finish_reason and r.request_id not in finished
        ]
    assert bench.num_preempted > 0
    assert requests[0].num_preemptions == 0, "the oldest is never preempted"
    assert finished == ["r0", "r1", "r2", "r3"]
    assert all(r.num_output_tokens == 41 for r in requests)
    assert bench.pool.counts().free + bench.pool.counts().cached == 14


def test_what_is_known_to_be_needed_is_never_overcommitted() -> None:
    bench = Bench(num_blocks=10, kv_overcommit=8.0)
    bench.add("a", 28, max_tokens=2)  # 7 blocks, of which the first chunk takes 4
    bench.add("b", 28, max_tokens=2)
    bench.step()
    bench.step()
    assert bench.scheduler.load(0).num_running == 1


def test_impossible_requests_are_refused_and_leave_nothing() -> None:
    bench = Bench(num_blocks=4, max_num_waiting=1)
    with pytest.raises(CapacityError, match="5 blocks needed"):
        bench.add("large", 10, max_tokens=8)
    for tokens, limit in (([], 5), (range(300), 5), (range(4), 0)):
        with pytest.raises(ValueError, match="request odd"):
            bench.add_tokens("odd", tokens, max_tokens=limit)
    bench.add("a", 4, max_tokens=1)
    with pytest.raises(ValueError, match="already here"):
        bench.add("a", 4, max_tokens=1)
    with pytest.raises(CapacityError, match="waiting"):
        bench.add("b", 4, max_tokens=1)
    bench.step()
    bench.add("b", 4, max_tokens=1)
    assert bench.step() == {"b": 4}


def test_a_request_that_fills_the_pool_alone_is_served() -> None:
    bench = Bench(num_blocks=4)
    request = bench.add("full", 10, max_tokens=7)  # 16 slots and one token without KV
    while bench.scheduler.has_work:
        assert bench.step()
    assert request.num_output_tokens == 7


# ------------------------------------------------------------ endings


def test_the_end_by_eos_stop_token_and_length() -> None:
    bench = Bench()
    for name, token, reason in (
        ("eos", EOS, FinishReason.STOP),
        ("stop", 9, FinishReason.STOP),
        ("length", 5, FinishReason.LENGTH),
    ):
        request = make_request(name, [3, 4])
        request.sampling = SamplingParams(max_tokens=1 + (token != 5), stop_token_ids=(9,))
        bench.scheduler.add(request)
        [progress] = bench.commit(bench.scheduler.plan(), token)
        assert progress.new_tokens == (token,)
        assert progress.finish_reason is reason
    assert not bench.scheduler.has_work


def test_ignore_eos_goes_on() -> None:
    bench = Bench()
    request = make_request("r", [3, 4])
    request.sampling = SamplingParams(max_tokens=3, ignore_eos=True)
    bench.scheduler.add(request)
    reasons = [bench.commit(bench.scheduler.plan(), EOS)[0].finish_reason for _ in range(3)]
    assert reasons == [None, None, FinishReason.LENGTH]


@pytest.mark.parametrize("when", ["waiting", "running", "in the step"])
def test_abort_frees_everything(when: str) -> None:
    bench = Bench()
    bench.add("a", 20)
    if when == "in the step":
        plan = bench.scheduler.plan()
        assert bench.scheduler.abort("a")
        assert bench.pool.counts().running > 0, "the step still writes its blocks"
        assert bench.commit(plan) == ()
    else:
        if when == "running":
            bench.step()
        assert bench.scheduler.abort("a")
    assert not bench.scheduler.has_work
    assert bench.pool.counts().running == 0
    assert not bench.scheduler.abort("a")
    assert bench.scheduler.plan().scheduled == ()


def test_a_failed_step_did_not_happen() -> None:
    bench = Bench()
    request = bench.add("a", 20)
    bench.add("b", 4)
    first = bench.scheduler.plan()
    bench.scheduler.abort("b")
    bench.scheduler.abandon(first)
    bench.scheduler.check_integrity()
    assert request.num_computed_tokens == 0
    assert len(bench.cache) == 0, "what was not computed cannot be found"
    assert bench.scheduler.plan().scheduled == first.scheduled[:1]


# ------------------------------------------------------------ prefill for a handoff


def test_a_prefill_only_request_reports_blocks_and_keeps_them() -> None:
    bench = Bench(max_num_batched_tokens=10)
    request = bench.add("p", 22, prefill_only=True)
    reported = []
    while bench.scheduler.has_work:
        [progress] = bench.commit(bench.scheduler.plan())
        reported.append([index for index, _ in progress.finished_blocks])
        for index, handle in progress.finished_blocks:
            assert handle == bench.pool.handle(request.block_table[index])
    assert reported == [[0, 1], [2, 3, 4], [5]]
    assert progress.new_tokens == (5,)
    assert progress.finish_reason is None
    assert bench.pool.counts().leased == 6
    assert bench.scheduler.release_held("p")
    assert not bench.scheduler.release_held("p")
    assert bench.pool.counts().leased == 0
    assert bench.pool.counts().cached == 6, "the partly filled one, too"


def test_cached_blocks_are_reported_with_the_first_step() -> None:
    bench = Bench()
    bench.add_tokens("a", range(12), max_tokens=1)
    bench.step()
    bench.add_tokens("p", range(14), prefill_only=True)
    [progress] = bench.commit(bench.scheduler.plan())
    assert [index for index, _ in progress.finished_blocks] == [0, 1, 2, 3]
    assert progress.num_cached_tokens == 12


def test_a_held_request_can_be_aborted() -> None:
    bench = Bench()
    bench.add("p", 6, prefill_only=True)
    bench.step()
    assert bench.scheduler.abort("p")
    assert bench.pool.counts().leased == 0


# ------------------------------------------------------------ reservations


def reserve(bench: Bench, tokens: Sequence[int], max_num_tokens: int) -> int:
    hashes = bench.cache.hashes(tokens, "")
    reservation = bench.scheduler.reserve(tokens, max_num_tokens, hashes)
    bench.scheduler.check_integrity()
    return reservation.id


def adopted(name: str, tokens: Sequence[int]) -> Request:
    request = make_request(name, [*tokens, 5], max_tokens=4)
    request.num_prompt_tokens = len(tokens)
    return request


def test_an_adopted_request_decodes_at_the_next_step() -> None:
    bench = Bench()
    tokens = range(10)
    reservation_id = reserve(bench, tokens, 14)
    assert bench.pool.counts().leased == 3
    assert bench.cache.match(bench.cache.hashes(tokens, "")) == [], "not verified yet"
    request = adopted("r", tokens)
    bench.scheduler.adopt(reservation_id, request)
    assert len(bench.cache.match(bench.cache.hashes(tokens, ""))) == 2
    assert bench.pool.counts().leased == 0
    assert bench.step() == {"r": 1}
    assert request.tokens == [*tokens, 5, 5]
    with pytest.raises(KeyError):
        bench.scheduler.adopt(reservation_id, adopted("again", tokens))


def test_a_reservation_counts_on_cached_blocks_and_holds_them() -> None:
    bench = Bench(num_blocks=8)
    bench.add_tokens("a", range(8), max_tokens=1)
    bench.step()
    tokens = [*range(8), 50]
    reservation = bench.scheduler.reserve(tokens, 20, bench.cache.hashes(tokens, ""))
    assert reservation.num_cached_tokens == 8
    assert len(reservation.handles) == 3
    assert all(bench.pool.is_current(handle) for handle in reservation.handles)
    assert bench.pool.counts().leased == 3


def test_reservations_count_growth_on_both_sides() -> None:
    bench = Bench(num_blocks=10)
    first = reserve(bench, range(8), 25)  # holds 2, may need 6
    assert bench.scheduler.load(0).blocks_promised == 4
    with pytest.raises(CapacityError, match="no room"):
        reserve(bench, range(100, 108), 25)
    bench.add("a", 8, max_tokens=17)
    assert bench.step() == {}, "the reservation's growth stands in the way"
    assert bench.scheduler.cancel_reservation(first)
    assert not bench.scheduler.cancel_reservation(first)
    assert bench.step() == {"a": 8}


def test_a_reservation_that_never_fits_is_refused() -> None:
    bench = Bench(num_blocks=4)
    with pytest.raises(CapacityError, match="the pool has 4"):
        reserve(bench, range(8), 18)


def test_adopting_what_was_not_reserved_changes_nothing() -> None:
    bench = Bench()
    reservation_id = reserve(bench, range(10), 14)
    for wrong in (
        adopted("other tokens", range(1, 11)),
        make_request("no first token", range(10)),
        make_request("outgrows", [*range(10), 5], max_tokens=60),
    ):
        with pytest.raises(ValueError, match=wrong.request_id):
            bench.scheduler.adopt(reservation_id, wrong)
    bench.scheduler.check_integrity()
    assert bench.scheduler.cancel_reservation(reservation_id)
    assert bench.pool.counts().free == 200


def test_an_adopted_request_without_a_seat_waits_with_its_blocks_and_goes_first() -> None:
    bench = Bench(max_num_seqs=1)
    bench.add("a", 4, max_tokens=2)
    bench.step()
    bench.add("b", 4, max_tokens=1)
    reservation_id = reserve(bench, range(10), 14)
    bench.scheduler.adopt(reservation_id, adopted("r", range(10)))
    assert bench.step() == {"a": 1}
    assert bench.step() == {"r": 1}


def test_unverified_blocks_are_not_found_after_cancelling() -> None:
    bench = Bench()
    tokens = range(8)
    hashes = bench.cache.hashes(tokens, "")
    reservation = bench.scheduler.reserve(tokens, 20, hashes)
    assert bench.pool.begin_io(reservation.handles[0])
    bench.scheduler.cancel_reservation(reservation.id)
    assert bench.cache.match(hashes) == []
    assert bench.pool.counts().quarantined == 1
    assert not bench.pool.begin_io(reservation.handles[1])
    bench.pool.end_io(reservation.handles[0].block_id)
    assert bench.pool.counts().free == 200


def test_preemption_takes_no_leased_blocks_and_goes_on_when_they_are_given_back() -> None:
    bench = Bench(num_blocks=8, kv_overcommit=3.0)
    old = bench.add("old", 8, max_tokens=24)  # 31 slots: the whole pool
    bench.step()
    reservation_id = reserve(bench, range(20), 21)  # 5 blocks
    for _ in range(10):
        bench.step()
    assert bench.step() == {}, "stalled, but not preempted"
    assert old.num_preemptions == 0
    assert bench.pool.counts().leased == 5
    bench.scheduler.cancel_reservation(reservation_id)
    while bench.scheduler.has_work:
        assert bench.step() == {"old": 1}


def test_an_adopted_request_can_be_preempted_and_recomputed() -> None:
    bench = Bench(num_blocks=8, kv_overcommit=3.0)
    old = bench.add("old", 8, max_tokens=24)
    bench.step()
    reservation_id = reserve(bench, range(20), 24)
    request = adopted("new", range(20))
    bench.scheduler.adopt(reservation_id, request)
    while bench.scheduler.has_work:
        bench.step()
    assert request.num_preemptions > 0
    assert request.num_output_tokens == 4
    assert old.num_output_tokens == 24


def test_who_is_preempted_after_being_scheduled_leaves_the_step() -> None:
    bench = Bench(num_blocks=7, kv_overcommit=3.0, max_num_batched_tokens=5)
    bench.add("old", 20, max_tokens=1)
    bench.step()
    new = make_request("new", [*range(50, 58), 5], max_tokens=12)
    bench.scheduler.adopt(reserve(bench, range(50, 58), 20), new)
    assert bench.step() == {"new": 1, "old": 4}
    assert bench.step() == {"new": 1, "old": 4}
    assert bench.step() == {"old": 4}, "its last block came from the other"
    assert (bench.num_preempted, new.num_tokens, new.num_computed_tokens) == (1, 11, 0)
    while bench.scheduler.has_work:
        assert bench.step()
    assert new.num_output_tokens == 12


def test_after_preemption_a_prefill_reports_its_new_blocks() -> None:
    bench = Bench(num_blocks=7, kv_overcommit=3.0, max_num_batched_tokens=8)
    bench.add("old", 10, max_tokens=8)
    bench.step()
    bench.step()
    request = bench.add("p", 16, prefill_only=True)
    blocks: dict[int, BlockHandle] = {}
    while bench.scheduler.has_work:
        for progress in bench.commit(bench.scheduler.plan()):
            blocks.update(progress.finished_blocks)
        if bench.num_preempted and not request.block_table:
            evicted = bench.pool.allocate(bench.pool.num_available, Owner.RUNNING)
            bench.pool.release(evicted, Owner.RUNNING)
    assert request.num_preemptions == 1
    assert [blocks[i] for i in range(4)] == list(bench.pool.handles(request.block_table))


# ------------------------------------------------------------ the rest


def test_config_refuses_nonsense() -> None:
    with pytest.raises(ConfigError, match="kv_overcommit"):
        EngineConfig(kv_overcommit=0.5)
    with pytest.raises(ConfigError, match="block_size"):
        EngineConfig(block_size=0)


def test_the_scheduler_loads_no_torch() -> None:
    code = "import engine.scheduler, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_chunk_limit_lets_several_prompts_advance_in_one_step() -> None:
    bench = Bench(long_prefill_token_threshold=6)
    bench.add("a", 10)
    bench.add("b", 10)
    assert bench.step() == {"a": 6, "b": 6}
    assert bench.step() == {"a": 4, "b": 4}
    assert bench.step() == {"a": 1, "b": 1}
