"""Where each request of one engine is, and how it lets go of its blocks.

waiting ──admitted──▶ running ──▶ over, or held until its blocks are handed off
    ▲ preempted ◀────────┘ ▲
adopted (blocks received) ─┘
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.plan import ScheduledRequest, StepPlan
from engine.prefix_cache import PrefixCache
from engine.request import Request


class Queues:
    """All requests of one engine. Decides nothing; who is where is for others to say."""

    def __init__(self, config: EngineConfig, pool: BlockPool, cache: PrefixCache) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self.max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.waiting: deque[Request] = deque()
        self.adopted: deque[Request] = deque()  # have blocks, wait for a seat
        self.running: list[Request] = []  # in order of admission
        self.held: dict[str, Request] = {}  # prefilled; blocks stay for the handoff
        self.requests: dict[str, Request] = {}  # waiting, adopted or running
        self.steps: list[frozenset[str]] = []  # by step in flight, the oldest first: who is in it
        self.leaving: set[str] = set()  # are over, but a step in flight computes them
        self.drafted: list[Request] = []  # may hold blocks for the step's draft tokens

    @property
    def num_free_seats(self) -> int:
        return self.max_running - self.num_seats_taken

    @property
    def num_seats_taken(self) -> int:
        return sum(request.width for request in self.running)

    @property
    def widest(self) -> int:
        """The most rows that one of the requests comes to need in a step."""
        return max((request.width for request in self.requests.values()), default=1)

    def has_seats_for(self, request: Request) -> bool:
        return self.num_seats_taken + request.width <= self.max_running

    def seat_adopted(self) -> None:
        """Those that have their blocks run, first come first served, while there are seats."""
        while self.adopted and self.has_seats_for(self.adopted[0]):
            self.running.append(self.adopted.popleft())

    def abort(self, request_id: str) -> bool:
        """End a request and free what it holds, at the step's commit if it is in one.

        False if it is not here. An aborted request appears in no later progress.
        """
        request = self.requests.get(request_id)
        if request is None:
            return self.release_held(request_id)
        if request_id in self.leaving:
            return False
        self._leave(request, self.steps)
        return True

    def end(self, request: Request) -> None:
        """It is over with the step that is being committed, the oldest of those in flight."""
        self._leave(request, self.steps[1:])

    def _leave(self, request: Request, steps: Iterable[frozenset[str]]) -> None:
        """Drop it, or let the last of these steps that computes it do so."""
        if any(request.request_id in step for step in steps):
            self.leaving.add(request.request_id)
        else:
            self.leaving.discard(request.request_id)
            self.drop(request)

    def drop(self, request: Request) -> None:
        """Take a request out of whatever it is in."""
        del self.requests[request.request_id]
        for queue in (self.running, self.waiting, self.adopted):
            if request in queue:
                queue.remove(request)
        self.let_go(request)

    def let_go(self, request: Request) -> None:
        """Release all that it runs on."""
        for row in request.rows:
            self.release_blocks(row, Owner.RUNNING)
        request.beams = None

    def copied(self, request: Request) -> None:
        """It does not need the tail any more that its last block is a copy of (engine/tails.py)."""
        if request.copied_block is not None and request.beam_of is None:
            self._pool.release(request.copied_block[:1], Owner.RUNNING)
            request.copied_block = None

    def release_blocks(self, request: Request, owner: Owner) -> None:
        self.copied(request)
        num_full = request.num_computed_tokens // self._config.block_size
        self._cache.release(request.block_table, request.block_hashes[:num_full], owner)
        request.block_table.clear()

    def release_held(self, request_id: str) -> bool:
        """The handoff needs a prefilled request's blocks no more; False if it is not known."""
        request = self.held.pop(request_id, None)
        if request is None:
            return False
        self.release_blocks(request, Owner.LEASED)
        return True

    def discard(self, request: Request) -> None:
        """End a request whose blocks, its prefix included, may hold what broke its logits."""
        for row in request.rows:
            self._cache.discard([*row.block_table, *(row.copied_block or ())])
            row.num_computed_tokens = 0
        self.end(request)

    def abandon_step(self, plan: StepPlan) -> None:
        """The last step in flight did not happen."""
        for item in plan.scheduled:
            if item.request.num_computed_tokens > item.start:  # it was looked beyond
                self._take_back(item)
        self.end_step(-1)

    def _take_back(self, item: ScheduledRequest) -> None:
        """What was counted of a step before it was over."""
        request = item.request
        request.num_computed_tokens = item.start
        request.num_in_flight, request.awaited_row = 0, None
        self._give_back(request)

    def end_step(self, index: int = 0) -> None:
        """A step in flight is over: those leave who waited for it alone."""
        if self.steps:
            del self.steps[index]
        for request_id in sorted(self.leaving):
            if not any(request_id in step for step in self.steps):
                self.leaving.remove(request_id)
                self.drop(self.requests[request_id])
        for request in self.drafted:
            self._give_back(request)
        self.drafted.clear()

    def _give_back(self, request: Request) -> None:
        """The blocks behind the request's last token, where no token is after all."""
        known = self._config.num_blocks_for(request.num_tokens)
        self._pool.release(reversed(request.block_table[known:]), Owner.RUNNING)
        del request.block_table[known:]

    def check_integrity(self, num_reserved_blocks: int) -> None:
        """Raise AssertionError where queues, requests and pool contradict each other."""
        queued = [*self.running, *self.adopted, *self.waiting]
        assert {r.request_id for r in queued} == set(self.requests), "a request is in no queue"
        assert len(queued) == len(self.requests), "a request is in two queues"
        assert self.num_seats_taken <= self.max_running, "more requests run than have seats"
        rows = [row for request in queued for row in request.rows]
        for row in rows:
            self._check_request(row)
        running = sum(len(row.block_table) for row in rows)
        running += sum(request.copied_block is not None for request in queued)
        leased = num_reserved_blocks + sum(len(r.block_table) for r in self.held.values())
        for owner, expected in ((Owner.RUNNING, running), (Owner.LEASED, leased)):
            counted = self._pool.num_references(owner)
            assert counted == expected, f"{counted} {owner.name} references, {expected} held"

    def _check_request(self, request: Request) -> None:
        request.check()
        held, name = len(request.block_table), request.request_id
        computed = self._config.num_blocks_for(request.num_computed_tokens)
        known = self._config.num_blocks_for(request.num_tokens)
        assert computed <= held <= known, f"{name} holds {held} blocks, not {computed} to {known}"
