"""Decides what each forward pass computes, and allocates the blocks that this needs.

There are no phases. Each request has tokens and computed tokens, and a step moves it closer to
having none behind; prefill, chunked prefill, decode and recomputation are the same thing:

    1. requests that are one token behind (decoding) come first: one token each;
    2. the rest of the token budget goes to running requests further behind, oldest first;
    3. then waiting requests are admitted, first come first served, while they fit;
    4. last, decoding requests may be computed beyond their last token, on draft tokens.

Nobody starves: seats are no more than the budget, so each running request of kind 2 leaves at least
its own token over from kind 1, and the oldest of them gets all that is left, up to the limit of a
chunk, or, where a prompt's logprobs are asked for, as many as there is memory for their logits.

Draft tokens are luxury: at most half of what kind 1 leaves over is kept for them; they preempt
nobody, and while somebody waits they take no block. Blocks behind the last token that stays go back
with the commit. No request is drafted beyond its limit, so predicted growth covers drafts too.

A step that did not fit into memory makes the next ones smaller for a while (`StepBudget`), seats
included: the newest requests beyond them are preempted, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from engine.admission import Admission
from engine.beams import Beams
from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.plan import PlanDraft, StepPlan
from engine.prefix_cache import PrefixCache
from engine.queues import Queues
from engine.request import BeamGroup, Request
from engine.step_budget import StepBudget
from engine.tails import Tails

NO_DRAFTS: Mapping[str, Sequence[int]] = {}
NOTHING = StepPlan(())


class Planner:
    """Seats, admits and preempts, for one step at a time."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        cache: PrefixCache,
        queues: Queues,
        admission: Admission,
        beams: Beams,
    ) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self._queues = queues
        self._admission = admission
        self._beams = beams
        self._tails = Tails(config, pool, cache)
        self._most_running = queues.max_running
        self.budget = StepBudget(config.max_num_batched_tokens)

    def plan(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> StepPlan:
        """What the next forward pass computes; empty if nothing can be computed now.

        `drafts`, by request: tokens that may follow its last one. As many are computed as fit.
        """
        draft = PlanDraft(self._limit(), self._config.long_prefill_token_threshold)
        self._fill(draft, drafts)
        self._queues.steps = [draft.request_ids]
        return draft.finish()

    def plan_ahead(self, step: StepPlan) -> StepPlan:
        """What follows a step in flight, as if its tokens were computed and those sampled known.

        Empty where that cannot be said before the step is over: who needs a block of somebody else
        takes it from nobody whom the step still computes.
        """
        self._assume(step)
        draft = PlanDraft(self._limit(), self._config.long_prefill_token_threshold, ahead=True)
        if self.budget.is_full:
            self._fill(draft, NO_DRAFTS)
        if draft.lacks_room or not draft.items:
            return NOTHING
        self._queues.steps.append(draft.request_ids)
        return draft.finish()

    def _assume(self, step: StepPlan) -> None:
        row = 0
        for item in step.scheduled:
            request = item.request
            if request.request_id not in self._queues.leaving:
                request.num_computed_tokens = item.end
                request.num_in_flight = item.num_new_tokens
                request.awaited_row = row if item.samples else None
            row += item.num_samples

    def _fill(self, draft: PlanDraft, drafts: Mapping[str, Sequence[int]]) -> None:
        self._keep_seats_within(draft)
        self._queues.seat_adopted()
        running = self._queues.running
        if draft.ahead:
            running = [r for r in running if r.goes_on and r.request_id not in self._queues.leaving]
        decoding = [r for r in running if r.num_behind <= 1]
        catching_up = [r for r in running if r.num_behind > 1]
        self._continue_all(decoding, draft)
        kept = min(sum(map(len, drafts.values())), draft.budget // 2)
        draft.budget -= kept
        self._continue_all(catching_up, draft)
        self._admit_waiting(draft)
        draft.budget += kept
        self._add_drafts(drafts, draft)

    def _limit(self) -> int:
        """Tokens of the step; a search whose beams must go together does not wait for ever."""
        if self.budget.is_full:
            return self.budget.now
        return max(self.budget.now, self._queues.widest)

    def _keep_seats_within(self, draft: PlanDraft) -> None:
        self._queues.max_running = min(self._most_running, draft.budget)
        while self._queues.num_seats_taken > self._queues.max_running:
            self._preempt(self._queues.running.pop(), draft)

    def _continue_all(self, requests: Sequence[Request], draft: PlanDraft) -> None:
        for request in requests:
            if request.beams is not None:
                self._continue_beams(request, request.beams, draft)
            elif request.block_table:  # else preempted a moment ago
                self._continue(request, draft)

    def _continue(self, request: Request, draft: PlanDraft) -> None:
        """Schedule a running request, or let it stall for a step if there are no blocks for it."""
        num_new_tokens = min(request.num_behind, draft.room_for(request))
        end = request.num_computed_tokens + num_new_tokens
        missing = max(0, self._config.num_blocks_for(end) - len(request.block_table))
        if num_new_tokens and self._make_room(missing, request, draft):
            request.block_table += self._pool.allocate(missing, Owner.RUNNING)
            draft.add(request, num_new_tokens)

    def _continue_beams(self, request: Request, group: BeamGroup, draft: PlanDraft) -> None:
        """Schedule all beams or none."""
        if draft.budget < len(group.search.running):
            return
        if not self._make_room(self._beams.num_copies(group), request, draft):
            return
        self._beams.fork(request)
        missing = [
            self._config.num_blocks_for(row.num_tokens) - len(row.block_table) for row in group.rows
        ]
        if self._make_room(sum(missing), request, draft):
            for row, count in zip(group.rows, missing, strict=True):
                row.block_table += self._pool.allocate(count, Owner.RUNNING)
                draft.add(row, 1)

    def _make_room(self, num_blocks: int, request: Request, draft: PlanDraft) -> bool:
        """Preempt requests newer than `request`, newest first, until `num_blocks` are available."""
        while self._pool.num_available < num_blocks:
            if draft.ahead:
                draft.lacks_room = True
                return False
            victims = self._queues.adopted or self._queues.running
            if victims[-1] is request:
                return False
            self._preempt(victims.pop(), draft)
        return True

    def _preempt(self, victim: Request, draft: PlanDraft) -> None:
        draft.remove_preempted(victim)
        self._queues.let_go(victim)  # a search begins again, and finds the same
        self._cache.extend(victim.block_hashes, victim.tokens, victim.cache_salt)
        victim.num_computed_tokens = 0
        victim.num_reported_blocks = 0
        victim.num_preemptions += 1
        self._queues.waiting.appendleft(victim)

    def _admit_waiting(self, draft: PlanDraft) -> None:
        """Admit in order, up to the first that does not fit.

        A request whose next block a running one is about to compute waits for that block instead
        of computing it too; others may pass it.
        """
        block_size = self._config.block_size
        for request in list(islice(self._queues.waiting, self._queues.max_running)):
            if not draft.budget or not self._queues.has_seats_for(request):
                return
            if not draft.room_for(request):
                continue
            # At least the last token is computed, whatever is cached: its row is needed.
            first_needed = 0 if request.needs_every_row else request.num_tokens - 1
            usable = request.block_hashes[: first_needed // block_size]
            matched = self._cache.match(usable)
            tail = self._tails.find(request, matched)
            if self._is_being_computed(usable, len(matched)):
                continue
            ahead = [*self._queues.running, *self._queues.adopted]
            known, most = self._admission.known(request), self._admission.most(request)
            if not self._admission.fits(known, most, matched, ahead):
                return
            self._queues.waiting.remove(request)
            self._admit(request, matched, tail, draft)

    def _add_drafts(self, drafts: Mapping[str, Sequence[int]], draft: PlanDraft) -> None:
        """Compute decoding requests beyond their last token, where there are slots for that."""
        for request_id, tokens in drafts.items():
            item = draft.items.get(request_id)
            if item is None or not item.samples or item.num_new_tokens > 1:
                continue
            request = item.request
            room = min(draft.budget, request.max_kv_tokens - request.num_tokens)
            slots = self._slots_beyond(request)
            taken = tuple(tokens[: max(0, min(room, slots))])
            if taken:
                end = self._config.num_blocks_for(item.end + len(taken))
                missing = end - len(request.block_table)
                request.block_table += self._pool.allocate(max(0, missing), Owner.RUNNING)
                self._queues.drafted.append(request)
                draft.add_draft(request, taken)

    def _slots_beyond(self, request: Request) -> int:
        """Slots for draft tokens of a request: new blocks only while nobody waits for any."""
        waited_for = self._queues.waiting or self._queues.adopted
        num_free = 0 if waited_for else self._pool.num_available
        num_slots = (len(request.block_table) + num_free) * self._config.block_size
        return num_slots - request.num_tokens

    def _is_being_computed(self, hashes: Sequence[bytes], index: int) -> bool:
        """Whether a running request will compute the block that is `index` in `hashes`."""
        if index >= len(hashes):
            return False
        return any(
            other.num_computed_tokens - other.num_in_flight <= index * self._config.block_size
            and other.block_hashes[index : index + 1] == [hashes[index]]
            for other in self._queues.running
        )

    def _admit(
        self, request: Request, matched: list[int], tail: int | None, draft: PlanDraft
    ) -> None:
        self._pool.acquire(matched, Owner.RUNNING)
        request.block_table = matched
        request.num_computed_tokens = len(matched) * self._config.block_size
        if tail is not None:
            self._tails.copy(request, tail)
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
        self._queues.running.append(request)
        self._continue(request, draft)
