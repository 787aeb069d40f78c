"""Decides what each forward pass computes, and keeps the blocks that this needs.

There are no phases. Each request has tokens and computed tokens, and a step moves it closer to
having none behind; prefill, chunked prefill, decode and recomputation are the same thing:

    1. requests that are one token behind (decoding) come first: one token each;
    2. the rest of the token budget goes to running requests further behind, oldest first;
    3. then waiting requests are admitted, first come first served, while they fit.

Nobody starves: seats are no more than the budget, so each running request of kind 2 leaves at least
its own token over from kind 1, and the oldest of them gets all that is left, up to the limit of a
chunk, or, where a prompt's logprobs are asked for, as many as there is memory for their logits.

A request is admitted if the blocks that it needs now exist, and if the growth that is predicted for
it and for all who were admitted before fits the available blocks plus the overcommitted ones. Only
overcommitment can make blocks run out; then the newest request is preempted and computed again
later. The oldest is never preempted and fits the pool alone, so it finishes, and so does the next.
Leased blocks are never taken; who waits for them waits for a deadline that others keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from engine.admission import Admission
from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.plan import PlanDraft, RequestProgress, ScheduledRequest, StepPlan
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.reservations import Reservation, Reservations
from engine.stops import finish_reason
from wire.errors import CapacityError
from wire.logprobs import Logprobs
from wire.types import BlockHandle, NodeLoad

NO_LOGPROBS: Mapping[str, Logprobs] = {}
NO_EMBEDDINGS: Mapping[str, bytes] = {}


class Scheduler:
    """Queues, seats and admission. Not thread-safe; `plan` and `commit` alternate."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        cache: PrefixCache,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self._eos_token_ids = eos_token_ids
        self._max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._waiting: deque[Request] = deque()
        self._adopted: deque[Request] = deque()  # have blocks, wait for a seat
        self._running: list[Request] = []  # in order of admission
        self._held: dict[str, Request] = {}  # prefilled; blocks stay for the handoff
        self._requests: dict[str, Request] = {}  # waiting, adopted or running
        self._reservations = Reservations(pool, cache, config.block_size)
        self._admission = Admission(config, pool, self._reservations)
        self._in_step: frozenset[str] = frozenset()
        self._aborted_in_step: set[str] = set()

    # ------------------------------------------------------------ requests come and go

    def add(self, request: Request) -> None:
        """Queue a request; ValueError if it makes no sense, CapacityError if it finds no room."""
        self._check_new(request)
        self._admission.check_fits_pool(request.max_kv_tokens)
        if len(self._waiting) >= self._config.max_num_waiting:
            raise CapacityError(f"{len(self._waiting)} requests are waiting")
        if not request.block_hashes:
            request.block_hashes = self._cache.hashes(request.tokens, request.cache_salt)
        self._requests[request.request_id] = request
        self._waiting.append(request)

    def _check_new(self, request: Request) -> None:
        name = request.request_id
        if name in self._requests or name in self._held:
            raise ValueError(f"request {name} is already here")
        if not request.tokens:
            raise ValueError(f"request {name} has no tokens")
        if request.max_num_tokens > self._config.max_model_len:
            raise ValueError(f"request {name} may exceed max_model_len")
        if request.num_tokens >= request.token_limit:
            raise ValueError(f"request {name} has nothing left to generate")

    def abort(self, request_id: str) -> bool:
        """End a request and free what it holds, at the step's commit if it is in one.

        False if it is not here. An aborted request appears in no later progress.
        """
        if request_id in self._in_step and request_id in self._requests:
            self._aborted_in_step.add(request_id)
            return True
        request = self._requests.get(request_id)
        if request is None:
            return self.release_held(request_id)
        self._drop(request)
        return True

    def _drop(self, request: Request) -> None:
        """Take a request out of whatever it is in."""
        del self._requests[request.request_id]
        for queue in (self._running, self._waiting, self._adopted):
            if request in queue:
                queue.remove(request)
        self._release_blocks(request, Owner.RUNNING)

    def _release_blocks(self, request: Request, owner: Owner) -> None:
        num_full = request.num_computed_tokens // self._config.block_size
        self._cache.release(request.block_table, request.block_hashes[:num_full], owner)
        request.block_table.clear()

    def release_held(self, request_id: str) -> bool:
        """The handoff needs a prefilled request's blocks no more; False if it is not known."""
        request = self._held.pop(request_id, None)
        if request is None:
            return False
        self._release_blocks(request, Owner.LEASED)
        return True

    # ------------------------------------------------------------ reservations

    def reserve(
        self, tokens: Sequence[int], max_num_tokens: int, hashes: list[bytes]
    ) -> Reservation:
        """Hold blocks for `tokens`, whose KV will be received; raises CapacityError."""
        max_kv_tokens = max(max_num_tokens - 1, len(tokens))
        self._admission.check_fits_pool(max_kv_tokens)
        matched = self._cache.match(hashes)
        preempted = (r for r in self._waiting if r.num_preemptions)
        ahead = [*self._running, *self._adopted, *preempted]
        if not self._admission.fits(len(tokens), max_kv_tokens, matched, ahead):
            raise CapacityError(
                f"no room for {len(tokens)} tokens that may become {max_num_tokens}: "
                f"{self._pool.num_available} blocks available, "
                f"{self._admission.promised(ahead)} promised"
            )
        max_blocks = self._config.num_blocks_for(max_kv_tokens)
        return self._reservations.open(tokens, hashes, matched, max_blocks)

    def rebind(
        self, reservation_id: int, tokens: Sequence[int], hashes: list[bytes]
    ) -> Reservation:
        """A new reservation in the room of an old one, whose limit stays; see Reservations.

        Raises KeyError, or CapacityError where too much of the room is still under transfer.
        """
        reserved = self._reservations.peek(reservation_id)
        matched = self._cache.match(hashes)
        ahead = [*self._running, *self._adopted]
        if not self._admission.fits_in_place(reserved, len(tokens), matched, ahead):
            raise CapacityError("transfers may still write too many of the reserved blocks")
        return self._reservations.rebind(reservation_id, tokens, hashes, matched)

    def adopt(self, reservation_id: int, request: Request) -> None:
        """Run `request` on a reservation's blocks, all received, as soon as there is a seat.

        Raises KeyError for an unknown reservation and ValueError where request and reservation
        differ; then the reservation stays.
        """
        reserved = self._reservations.peek(reservation_id)
        self._check_new(request)
        num_reserved = len(reserved.tokens)
        if request.tokens[:num_reserved] != list(reserved.tokens):
            raise ValueError(f"request {request.request_id} has other tokens than were reserved")
        if request.num_tokens == num_reserved or request.prefill_only:
            raise ValueError(f"request {request.request_id} has no token to start decoding from")
        if self._config.num_blocks_for(request.max_kv_tokens) > reserved.max_blocks:
            raise ValueError(f"request {request.request_id} may outgrow its reservation")
        self._reservations.adopt(reservation_id)
        request.block_table = reserved.block_ids
        request.block_hashes = reserved.hashes
        request.num_computed_tokens = request.num_cached_tokens = num_reserved
        self._requests[request.request_id] = request
        self._adopted.append(request)

    def cancel_reservation(self, reservation_id: int) -> bool:
        """Free a reservation's blocks (quarantined while a transfer may write them)."""
        return self._reservations.cancel(reservation_id)

    # ------------------------------------------------------------ planning a step

    def plan(self) -> StepPlan:
        """What the next forward pass computes; empty if nothing can be computed now."""
        draft = PlanDraft(
            self._config.max_num_batched_tokens, self._config.long_prefill_token_threshold
        )
        while self._adopted and len(self._running) < self._max_running:
            self._running.append(self._adopted.popleft())
        for request in sorted(self._running, key=lambda r: r.num_behind > 1):
            if request.block_table:  # else preempted a moment ago
                self._continue(request, draft)
        self._admit_waiting(draft)
        self._in_step = frozenset(draft.items)
        return draft.finish()

    def _continue(self, request: Request, draft: PlanDraft) -> None:
        """Schedule a running request, or let it stall for a step if there are no blocks for it."""
        num_new_tokens = min(request.num_behind, draft.room_for(request))
        end = request.num_computed_tokens + num_new_tokens
        missing = max(0, self._config.num_blocks_for(end) - len(request.block_table))
        if num_new_tokens and self._make_room(missing, request, draft):
            request.block_table += self._pool.allocate(missing, Owner.RUNNING)
            draft.add(request, num_new_tokens)

    def _make_room(self, num_blocks: int, request: Request, draft: PlanDraft) -> bool:
        """Preempt requests newer than `request`, newest first, until `num_blocks` are available."""
        while self._pool.num_available < num_blocks:
            victims = self._adopted or self._running
            if victims[-1] is request:
                return False
            self._preempt(victims.pop(), draft)
        return True

    def _preempt(self, victim: Request, draft: PlanDraft) -> None:
        draft.remove_preempted(victim)
        self._release_blocks(victim, Owner.RUNNING)
        self._cache.extend(victim.block_hashes, victim.tokens, victim.cache_salt)
        victim.num_computed_tokens = 0
        victim.num_reported_blocks = 0
        victim.num_preemptions += 1
        self._waiting.appendleft(victim)

    def _admit_waiting(self, draft: PlanDraft) -> None:
        """Admit in order, up to the first that does not fit.

        A request whose next block a running one is about to compute waits for that block instead
        of computing it too; others may pass it.
        """
        block_size = self._config.block_size
        for request in list(islice(self._waiting, self._max_running)):
            if not draft.budget or len(self._running) >= self._max_running:
                return
            if not draft.room_for(request):
                continue
            # At least the last token is computed, whatever is cached: its row is needed.
            first_needed = 0 if request.needs_every_row else request.num_tokens - 1
            usable = request.block_hashes[: first_needed // block_size]
            matched = self._cache.match(usable)
            if self._is_being_computed(usable, len(matched)):
                continue
            ahead = [*self._running, *self._adopted]
            limit = request.max_kv_tokens
            if not self._admission.fits(request.num_tokens, limit, matched, ahead):
                return
            self._waiting.remove(request)
            self._admit(request, matched, draft)

    def _is_being_computed(self, hashes: Sequence[bytes], index: int) -> bool:
        """Whether a running request will compute the block that is `index` in `hashes`."""
        if index >= len(hashes):
            return False
        return any(
            other.num_computed_tokens <= index * self._config.block_size
            and other.block_hashes[index : index + 1] == [hashes[index]]
            for other in self._running
        )

    def _admit(self, request: Request, matched: list[int], draft: PlanDraft) -> None:
        self._pool.acquire(matched, Owner.RUNNING)
        request.block_table = matched
        request.num_computed_tokens = len(matched) * self._config.block_size
        if not request.num_preemptions:
            request.num_cached_tokens = request.num_computed_tokens
        self._running.append(request)
        self._continue(request, draft)

    # ------------------------------------------------------------ after a step

    def commit(
        self,
        plan: StepPlan,
        tokens: Sequence[int],
        logprobs: Mapping[str, Logprobs] = NO_LOGPROBS,
        corrupted: Collection[str] = (),
        embeddings: Mapping[str, bytes] = NO_EMBEDDINGS,
    ) -> tuple[RequestProgress, ...]:
        """Enter what a step computed; `tokens` are the sampled ones, in the plan's order.

        `logprobs`, by request: of its sampled token and of the prompt tokens that its chunk told.
        `corrupted` requests end without progress, and what they computed is found by nobody.
        `embeddings`, by request: of those that end with one.
        """
        samples = [item.samples for item in plan.scheduled]
        assert sum(samples) == len(tokens), f"{len(tokens)} tokens for {sum(samples)} rows"
        sampled = iter(tokens)
        progress = []
        for item, has_token in zip(plan.scheduled, samples, strict=True):
            new_tokens = (next(sampled),) if has_token else ()
            if item.request.request_id in corrupted:
                self._discard(item.request)
            elif item.request.request_id not in self._aborted_in_step:
                done = self._advance(item, new_tokens, logprobs.get(item.request.request_id))
                progress.append(self._embedded(done, item.request, embeddings))
        self.end_step()
        return tuple(progress)

    def _discard(self, request: Request) -> None:
        """End a request whose blocks, its prefix included, may hold what broke its logits."""
        self._aborted_in_step.discard(request.request_id)
        self._cache.discard(request.block_table)
        request.num_computed_tokens = 0
        self._drop(request)

    def end_step(self) -> None:
        """Carry out aborts that waited for the step; all there is to do for a step that failed."""
        for request_id in self._aborted_in_step:
            self._drop(self._requests[request_id])
        self._aborted_in_step.clear()
        self._in_step = frozenset()

    def _advance(
        self, item: ScheduledRequest, new_tokens: tuple[int, ...], logprobs: Logprobs | None
    ) -> RequestProgress:
        request = item.request
        if logprobs is not None:
            request.prompt_rows[item.start :] = logprobs.prompt  # a preempted prompt begins anew
            logprobs = Logprobs(logprobs.tokens, tuple(request.prompt_rows))
        request.num_computed_tokens = item.end
        self._publish(request, item.start)
        finished = self._take_finished_blocks(request) if request.prefill_only else ()
        index = request.num_output_tokens
        if new_tokens:
            request.tokens += new_tokens
            request.finish_reason = finish_reason(request, self._eos_token_ids)
            self._leave_if_done(request)
        return RequestProgress(
            request_id=request.request_id,
            num_computed_tokens=request.num_computed_tokens,
            index=index,
            new_tokens=new_tokens,
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            finished_blocks=finished,
            logprobs=logprobs if new_tokens else None,
        )

    def _embedded(
        self, progress: RequestProgress, request: Request, embeddings: Mapping[str, bytes]
    ) -> RequestProgress:
        """Ends the request if it has its embedding now."""
        embedding = embeddings.get(request.request_id)
        if embedding is None:
            return progress
        self._drop(request)
        return replace(progress, embedding=embedding)

    def _publish(self, request: Request, start: int) -> None:
        """Make the blocks that became full since `start` findable."""
        size = self._config.block_size
        old, new = start // size, request.num_computed_tokens // size
        if new > len(request.block_hashes):
            self._cache.extend(request.block_hashes, request.tokens, request.cache_salt)
        self._cache.publish(request.block_table[old:new], request.block_hashes[old:new])

    def _take_finished_blocks(self, request: Request) -> tuple[tuple[int, BlockHandle], ...]:
        """Blocks that will not change any more and were not reported; call before sampling."""
        finished = self._finished_blocks(request, request.num_computed_tokens)
        request.num_reported_blocks += len(finished)
        return finished

    def _finished_blocks(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[tuple[int, BlockHandle], ...]:
        """Not reported blocks that do not change once so much is computed."""
        if num_computed_tokens < request.num_tokens:
            end = num_computed_tokens // self._config.block_size
        else:
            end = len(request.block_table)
        blocks = range(request.num_reported_blocks, end)
        return tuple((i, self._pool.handle(request.block_table[i])) for i in blocks)

    def blocks_to_finish(
        self, plan: StepPlan
    ) -> tuple[tuple[str, tuple[tuple[int, BlockHandle], ...]], ...]:
        """By request, the blocks that the planned step will report as finished."""
        return tuple(
            (item.request.request_id, finished)
            for item in plan.scheduled
            if item.request.prefill_only
            and (finished := self._finished_blocks(item.request, item.end))
        )

    def _leave_if_done(self, request: Request) -> None:
        """Free the seat of a request that sampled its last token here."""
        if request.prefill_only:
            self._pool.hand_over(request.block_table, Owner.RUNNING, Owner.LEASED)
            self._held[request.request_id] = request
            self._running.remove(request)
            del self._requests[request.request_id]
        elif request.finish_reason is not None:
            self._drop(request)

    # ------------------------------------------------------------ many steps at once

    def num_plain_steps(self) -> int:
        """How many coming steps will decode one token of each running request, and nothing else.

        None of them seats, admits, preempts or ends a request, if no token ends one early. A
        simulator skips them; an engine has to compute them.
        """
        full = len(self._running) >= self._max_running
        if not self._running or self._adopted or (self._waiting and not full):
            return 0
        if any(r.num_behind != 1 or r.prefill_only for r in self._running):
            return 0
        to_the_end = min(r.token_limit - r.num_tokens for r in self._running) - 1
        # A request needs at most one block more for each block size of steps.
        blocks_each = self._pool.num_available // len(self._running)
        return max(0, min(to_the_end, blocks_each * self._config.block_size))

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_running_tokens(self) -> int:
        """What the next step would read if all running requests only decode."""
        return sum(request.num_tokens for request in self._running)

    def skip_plain_steps(self, num_steps: int) -> None:
        """Be where `num_steps` plain steps lead to; each request's last token stands for theirs."""
        for request in self._running:
            start = request.num_computed_tokens
            end = start + num_steps
            missing = self._config.num_blocks_for(end) - len(request.block_table)
            if missing > 0:
                request.block_table += self._pool.allocate(missing, Owner.RUNNING)
            request.tokens += request.tokens[-1:] * num_steps
            request.num_computed_tokens = end
            if end // self._config.block_size > start // self._config.block_size:
                self._publish(request, start)

    # ------------------------------------------------------------ what others may know

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def load(self, step: int) -> NodeLoad:
        """A snapshot for the router; the node adds `stalled_s`, as there is no clock here."""
        waiting = sum(request.num_tokens for request in self._waiting)
        catching_up = sum(r.num_behind for r in self._running if r.num_behind > 1)
        return NodeLoad(
            step=step,
            num_running=len(self._running),
            num_waiting=len(self._waiting) + len(self._adopted),
            queued_tokens=waiting + catching_up,
            blocks_total=self._pool.num_blocks,
            blocks_free=self._pool.num_available,
            blocks_promised=self._admission.promised((*self._running, *self._adopted)),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where queues, requests, pool and cache contradict each other."""
        self._pool.check_integrity()
        self._cache.check_integrity()
        queued = [*self._running, *self._adopted, *self._waiting]
        assert {r.request_id for r in queued} == set(self._requests), "a request is in no queue"
        assert len(queued) == len(self._requests), "a request is in two queues"
        assert len(self._running) <= self._max_running, "more requests run than have seats"
        for request in queued:
            self._check_request(request)
        running = sum(len(r.block_table) for r in queued)
        leased = self._reservations.num_blocks + sum(
            len(r.block_table) for r in self._held.values()
        )
        for owner, expected in ((Owner.RUNNING, running), (Owner.LEASED, leased)):
            counted = self._pool.num_references(owner)
            assert counted == expected, f"{counted} {owner.name} references, {expected} held"

    def _check_request(self, request: Request) -> None:
        request.check()
        held, name = len(request.block_table), request.request_id
        computed = self._config.num_blocks_for(request.num_computed_tokens)
        known = self._config.num_blocks_for(request.num_tokens)
        assert computed <= held <= known, f"{name} holds {held} blocks, not {computed} to {known}"
