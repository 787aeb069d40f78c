"""The engine's books: requests come, are planned into steps and committed, and go.

What a step computes is decided in `engine.planning` and entered in `engine.committing`; where
requests are is kept in `engine.queues`.

A request is admitted if the blocks that it needs now exist, and if the growth that is predicted for
it and for all who were admitted before fits the available blocks plus the overcommitted ones. Only
overcommitment can make blocks run out; then the newest request is preempted and computed again
later. The oldest is never preempted and fits the pool alone, so it finishes, and so does the next.
Leased blocks are never taken; who waits for them waits for a deadline that others keep.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from engine.admission import Admission
from engine.beams import Beams
from engine.block_pool import BlockPool, Owner
from engine.committing import NO_EMBEDDINGS, NO_LOGPROBS, Committer
from engine.config import EngineConfig
from engine.plan import RequestProgress, StepPlan
from engine.planning import NO_DRAFTS, Planner
from engine.prefix_cache import PrefixCache
from engine.queues import Queues
from engine.request import Request
from engine.reservations import Reservation, Reservations
from wire.errors import CapacityError
from wire.logprobs import Logprobs
from wire.types import BlockHandle, NodeLoad


class Scheduler:
    """Queues, seats and admission. Not thread-safe.

    `plan` and `commit` alternate; or `plan_ahead` follows a step, which is committed after it.
    """

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
        self._queues = Queues(config, pool, cache)
        self._reservations = Reservations(pool, cache, config.block_size)
        self._admission = Admission(config, pool, self._reservations)
        self._beams = Beams(config, pool, self._queues, eos_token_ids)
        self._planner = Planner(config, pool, cache, self._queues, self._admission, self._beams)
        self._committer = Committer(config, pool, cache, self._queues, self._beams, eos_token_ids)

    # ------------------------------------------------------------ requests come and go

    def add(self, request: Request, *, only_with_room: bool = False) -> None:
        """Queue a request; ValueError if it makes no sense, CapacityError if it finds no room.

        With `only_with_room` there must be blocks for it now, behind all who are here already.
        """
        self._check_new(request)
        self._beams.prepare(request)
        self._admission.check_fits_pool(self._admission.most(request))
        if len(self._queues.waiting) >= self._config.max_num_waiting:
            raise CapacityError(f"{len(self._queues.waiting)} requests are waiting")
        if not request.block_hashes:
            request.block_hashes = self._cache.hashes(request.tokens, request.cache_salt)
        if only_with_room:
            self._check_room(request)
        self._queues.requests[request.request_id] = request
        self._queues.waiting.append(request)

    def _check_room(self, request: Request) -> None:
        """Raise CapacityError unless the blocks are there, behind all who are here already."""
        reused = 0 if request.needs_every_row else (request.num_tokens - 1)
        matched = self._cache.match(request.block_hashes[: reused // self._config.block_size])
        ahead = [*self._queues.running, *self._queues.adopted, *self._queues.waiting]
        known, most = self._admission.known(request), self._admission.most(request)
        if not self._admission.fits(known, most, matched, ahead):
            raise CapacityError(self._no_room(request.num_tokens, most, ahead))

    def _no_room(self, num_tokens: int, most: int, ahead: Collection[Request]) -> str:
        return (
            f"no room for {num_tokens} tokens that may need {most} blocks: "
            f"{self._pool.num_available} available, {self._admission.promised(ahead)} promised"
        )

    def _check_new(self, request: Request) -> None:
        name = request.request_id
        if name in self._queues.requests or name in self._queues.held:
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
        return self._queues.abort(request_id)

    def release_held(self, request_id: str) -> bool:
        """The handoff needs a prefilled request's blocks no more; False if it is not known."""
        return self._queues.release_held(request_id)

    # ------------------------------------------------------------ reservations

    def reserve(
        self, tokens: Sequence[int], max_num_tokens: int, hashes: list[bytes], width: int = 1
    ) -> Reservation:
        """Hold blocks for `tokens`, whose KV will be received; raises CapacityError.

        What `width` beams may grow by is promised with them.
        """
        most, known = (
            self._config.num_blocks_for_beams(len(tokens), num_tokens, width)
            for num_tokens in (max(max_num_tokens - 1, len(tokens)), len(tokens) + (width > 1))
        )
        self._admission.check_fits_pool(most)
        matched = self._cache.match(hashes)
        # A prompt that another node will answer may wait; others here were let in before this one.
        waiting = (r for r in self._queues.waiting if r.num_preemptions or not r.prefill_only)
        ahead = [*self._queues.running, *self._queues.adopted, *waiting]
        if not self._admission.fits(known, most, matched, ahead):
            raise CapacityError(self._no_room(len(tokens), most, ahead))
        return self._reservations.open(tokens, hashes, matched, most)

    def rebind(
        self, reservation_id: int, tokens: Sequence[int], hashes: list[bytes]
    ) -> Reservation:
        """A new reservation in the room of an old one, whose limit stays; see Reservations.

        Raises KeyError, or CapacityError where too much of the room is still under transfer.
        """
        reserved = self._reservations.peek(reservation_id)
        matched = self._cache.match(hashes)
        ahead = [*self._queues.running, *self._queues.adopted]
        if not self._admission.fits_in_place(reserved, len(tokens), matched, ahead):
            raise CapacityError("transfers may still write too many of the reserved blocks")
        return self._reservations.rebind(reservation_id, tokens, hashes, matched)

    def adopt(self, reservation_id: int, request: Request, row: bytes = b"") -> None:
        """Run `request` on a reservation's blocks, all received, as soon as there is a seat.

        A beam search needs the `row` of logprobs of its prompt's end, and is not over with it.
        Raises KeyError for an unknown reservation and ValueError where request and reservation
        differ; then the reservation stays.
        """
        reserved = self._reservations.peek(reservation_id)
        self._check_new(request)
        num_reserved = len(reserved.tokens)
        if request.tokens[:num_reserved] != list(reserved.tokens):
            raise ValueError(f"request {request.request_id} has other tokens than were reserved")
        started = row if request.sampling.beam else request.num_tokens > num_reserved
        if not started or request.prefill_only:
            raise ValueError(f"request {request.request_id} has no token to start decoding from")
        self._beams.prepare(request)
        if self._admission.most(request) > reserved.max_blocks:
            raise ValueError(f"request {request.request_id} may outgrow its reservation")
        if row and self._beams.first(request, row).over:
            raise ValueError(f"request {request.request_id} has nothing left to search for")
        self._reservations.adopt(reservation_id)
        request.block_table = reserved.block_ids
        request.block_hashes = reserved.hashes
        request.num_computed_tokens = request.num_cached_tokens = num_reserved
        self._queues.requests[request.request_id] = request
        self._queues.adopted.append(request)
        if row:
            self._beams.begin(request, row)

    def cancel_reservation(self, reservation_id: int) -> bool:
        """Free a reservation's blocks (quarantined while a transfer may write them)."""
        return self._reservations.cancel(reservation_id)

    # ------------------------------------------------------------ a step

    def decoding(self) -> list[Request]:
        """Requests of which the next step would compute the last token, and no more."""
        seated = islice(self._queues.adopted, self._queues.num_free_seats)
        running = (*self._queues.running, *seated)
        return [
            r
            for r in running
            if r.num_behind == 1 and not r.prefill_only and r.sampling.beam is None
        ]

    def plan(self, drafts: Mapping[str, Sequence[int]] = NO_DRAFTS) -> StepPlan:
        """What the next forward pass computes; see Planner.plan."""
        return self._planner.plan(drafts)

    def commit(
        self,
        plan: StepPlan,
        tokens: Sequence[int],
        logprobs: Mapping[str, Logprobs] = NO_LOGPROBS,
        corrupted: Collection[str] = (),
        embeddings: Mapping[str, bytes] = NO_EMBEDDINGS,
    ) -> tuple[RequestProgress, ...]:
        """See Committer.commit."""
        self._planner.budget.fitted()
        return self._committer.commit(plan, tokens, logprobs, corrupted, embeddings)

    def plan_ahead(self, step: StepPlan) -> StepPlan:
        """What follows a step that is not over; see Planner.plan_ahead."""
        return self._planner.plan_ahead(step)

    def still_here(self, request_ids: Collection[str]) -> list[str]:
        """Those who are not over already, with only a step in flight to leave."""
        return [name for name in request_ids if name not in self._queues.leaving]

    def abandon(self, plan: StepPlan) -> None:
        """The planned step, the last one in flight, failed: it did not happen."""
        self._queues.abandon_step(plan)

    def did_not_fit(self, plan: StepPlan) -> bool:
        """The step ran out of memory: the next ones are smaller; False if none can be."""
        self.abandon(plan)
        return self._planner.budget.did_not_fit(plan.num_tokens, self._queues.widest)

    def blocks_to_finish(
        self, plan: StepPlan
    ) -> tuple[tuple[str, tuple[tuple[int, BlockHandle], ...]], ...]:
        """By request, the blocks that the planned step will report as finished."""
        return self._committer.blocks_to_finish(plan)

    # ------------------------------------------------------------ many steps at once

    def num_plain_steps(self) -> int:
        """How many coming steps will decode one token of each running request, and nothing else.

        Who has only waited for a seat runs from here on, as from the next plan on. No step admits
        or preempts a request, and only the last may end one, if no token does so early. A simulator
        skips them; an engine has to compute them.
        """
        self._queues.seat_adopted()
        running = self._queues.running
        full = len(running) >= self._queues.max_running
        if not running or (self._queues.waiting and not full):
            return 0
        to_the_end = self._config.max_model_len
        for request in running:
            num_tokens = request.num_tokens
            if request.num_computed_tokens != num_tokens - 1 or request.prefill_only:
                return 0
            if num_tokens == request.num_prompt_tokens:
                return 0  # the first token is to come
            to_the_end = min(to_the_end, request.token_limit - num_tokens)
        # A request needs at most one block more for each block size of steps.
        blocks_each = self._pool.num_available // len(running)
        return min(to_the_end, blocks_each * self._config.block_size)

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_running_tokens(self) -> int:
        """What the next step would read if all running requests only decode."""
        return sum(request.num_tokens for request in self._queues.running)

    def skip_plain_steps(self, num_steps: int) -> tuple[RequestProgress, ...]:
        """Be where `num_steps` plain steps lead to; each request's last token stands for theirs.

        Returns what came of the requests that end there.
        """
        ended, block_size, running = [], self._config.block_size, self._queues.running
        missing = [
            max(0, -(-(r.num_computed_tokens + num_steps) // block_size) - len(r.block_table))
            for r in running
        ]
        blocks = iter(self._pool.allocate(sum(missing), Owner.RUNNING))
        for request, num_blocks in zip(running, missing, strict=True):
            start = request.num_computed_tokens
            end = start + num_steps
            request.block_table += islice(blocks, num_blocks)
            request.tokens += request.tokens[-1:] * num_steps
            request.num_computed_tokens = end
            if end // block_size > start // block_size:
                self._committer.publish(request, start)
            if end + 1 >= request.token_limit:
                ended.append(request)
        return tuple([self._committer.end_at_limit(request, num_steps) for request in ended])

    # ------------------------------------------------------------ what others may know

    @property
    def has_work(self) -> bool:
        return bool(self._queues.requests)

    def load(self, step: int) -> NodeLoad:
        """A snapshot for the router; the node adds `stalled_s`, as there is no clock here."""
        waiting = sum(request.num_tokens for request in self._queues.waiting)
        catching_up = sum(r.num_behind for r in self._queues.running if r.num_behind > 1)
        return NodeLoad(
            step=step,
            num_running=len(self._queues.running),
            num_waiting=len(self._queues.waiting) + len(self._queues.adopted),
            queued_tokens=waiting + catching_up,
            blocks_total=self._pool.num_blocks,
            blocks_free=self._pool.num_available,
            blocks_promised=self._admission.promised(
                (*self._queues.running, *self._queues.adopted)
            ),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where queues, requests, pool and cache contradict each other."""
        self._pool.check_integrity()
        self._cache.check_integrity()
        self._queues.check_integrity(self._reservations.num_blocks)
