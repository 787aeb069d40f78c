"""Drafts by a head on the target's own states (engine.drafting.head), in KV blocks of its own.

    target's rows     base ................ num_tokens - 2 | last token
    head's KV         | computed | waiting                 | draft ...     one pass per token
                      0      num_valid

The target's states come with every step; a row waits until the token behind it is known, and is
computed when a draft is wanted. What a draft was computed on, after its first token, are guesses:
those rows are computed again from the target's states.

A head's context begins where this node began to compute (`base`), or where rows that nobody wanted
a draft of became too many. Its positions count from there: rotary attention sees only distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.block_pool import BlockPool, Owner
from engine.drafting.drafter import Ask
from engine.drafting.head import DraftHead
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.rows import CORRUPTED, Ahead
from engine.runner import ModelRunner
from engine.sampler import Sampler

CATCH_UP = 256
"""Rows per step that those who wait with many may be computed; a step waits for them."""
MOST_WAITING = 64
"""Rows of a request that are kept while nobody wants a draft of it."""


class Waiting:
    """States [T, S] of consecutive rows, as they come and go."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self.num_rows = 0

    def add(self, rows: Tensor) -> None:
        if len(rows):
            self._parts.append(rows)
            self.num_rows += len(rows)

    def keep(self, num_rows: int) -> None:
        """Only the first ones."""
        while self.num_rows > num_rows:
            part = self._parts.pop()
            self.num_rows -= len(part)
            self.add(part[: max(0, num_rows - self.num_rows)])

    def take(self, num_rows: int) -> list[Tensor]:
        """The first ones, which wait no more; those behind them do not keep their memory."""
        taken: list[Tensor] = []
        while num_rows:
            part = self._parts.pop(0)
            self.num_rows -= len(part)
            taken.append(part[:num_rows])
            if len(part) > num_rows:
                self._parts.insert(0, part[num_rows:].clone())
                self.num_rows += len(part) - num_rows
            num_rows -= len(taken[-1])
        return taken


@dataclass(slots=True)
class _Shadow:
    """A request as the head knows it: row j is of the target's row base + j and token behind it."""

    target: Request
    own: Request  # with this head's blocks
    base: int
    num_valid: int = 0  # rows computed from the target's states
    num_known: int = 0  # of its tokens, those that are the target's; then comes the draft
    waiting: Waiting = field(default_factory=Waiting)
    state: Tensor | None = None  # [1, H], of the last row

    @property
    def first_waiting(self) -> int:
        """The target's row that waits, or the one that would."""
        return self.base + self.num_valid

    def restart(self, base: int) -> None:
        """Forget what is before the target's row `base`."""
        self.base, self.num_valid = base, 0
        self.own.tokens.clear()

    def saw(self, start: int, rows: Tensor) -> None:
        """The target's states from its row `start` on; what was said of these before is void."""
        if not self.base <= start <= self.first_waiting + self.waiting.num_rows:
            self.waiting.keep(0)
            self.restart(start)
        known = max(0, self.first_waiting - start)  # computed again, after a preemption
        self.waiting.keep(start + known - self.first_waiting)
        self.waiting.add(rows[known:])

    def forget_oldest(self, most: int) -> None:
        excess = self.waiting.num_rows - most
        if excess > 0:
            start = self.first_waiting + excess
            self.waiting.take(excess)
            self.restart(start)

    def follow(self) -> int:
        """Take over the target's tokens; how many rows can be computed."""
        mine = self.own.tokens
        del mine[self.num_valid :]
        mine += self.target.tokens[self.first_waiting + 1 :]
        self.own.num_computed_tokens = self.num_valid
        self.num_known = len(mine)
        return min(self.waiting.num_rows, self.own.num_behind)

    def drafted(self) -> tuple[int, ...]:
        return tuple(self.own.tokens[self.num_known :])


class HeadDrafter:
    """See engine.drafting.drafter.ReadingDrafter.

    Args:
        runner: of the head.
    """

    cost_per_token = True

    def __init__(
        self,
        method: str,
        head: DraftHead,
        runner: ModelRunner,
        sampler: Sampler,
        *,
        num_blocks: int,
        block_size: int,
    ) -> None:
        self.method = method
        self.layers = head.layers
        self._head = head
        self._runner = runner
        self._sampler = sampler
        self._pool = BlockPool(num_blocks, epoch=0)
        self._block_size = block_size
        self._shadows: dict[str, _Shadow] = {}

    # ------------------------------------------------------------ the target's states

    def reads(self, plan: StepPlan) -> bool:
        """See ReadingDrafter."""
        return any(_may_be_drafted(item.request) for item in plan.scheduled)

    @torch.inference_mode()
    def saw(self, plan: StepPlan, states: Tensor) -> None:
        """See ReadingDrafter. Prompts are computed at once: their states are many."""
        self._forget_ended()
        items = plan.scheduled
        parts = torch.split(states, [item.num_new_tokens for item in items])
        chunks = []
        for item, rows in zip(items, parts, strict=True):
            if not _may_be_drafted(item.request):
                continue
            shadow = self._shadow(item.request, item.start)
            shadow.saw(item.start, rows)
            if item.num_new_tokens > 1 + len(item.draft_tokens):
                chunks.append(shadow)
        known = [(shadow, shadow.follow()) for shadow in chunks]
        self._compute([(s, n) for s, n in known if n and self._has_room(s, n)])
        for shadow in self._shadows.values():
            shadow.forget_oldest(MOST_WAITING)

    def _shadow(self, target: Request, start: int) -> _Shadow:
        shadow = self._shadows.get(target.request_id)
        if shadow is not None and shadow.target is not target:
            self._release(self._shadows.pop(target.request_id))
            shadow = None
        if shadow is None:
            own = Request(
                request_id=target.request_id,
                tokens=[],
                num_prompt_tokens=0,
                sampling=target.sampling,
                max_num_tokens=target.max_num_tokens,
            )
            shadow = self._shadows[target.request_id] = _Shadow(target, own, start)
        return shadow

    def _forget_ended(self) -> None:
        """A request that ended, or was preempted, has no blocks."""
        ended = [name for name, s in self._shadows.items() if not s.target.block_table]
        for name in ended:
            self._release(self._shadows.pop(name))

    def _release(self, shadow: _Shadow) -> None:
        self._pool.release(shadow.own.block_table, Owner.RUNNING)
        shadow.own.block_table.clear()

    # ------------------------------------------------------------ drafts

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        """See Drafter."""
        self._forget_ended()
        going = self._first_pass([ask for ask in asks if ask.num_tokens])
        drafted = list(going)
        for depth in range(2, max((most for _, most in going), default=0) + 1):
            going = [(s, n) for s, n in going if n >= depth and s.own.tokens[-1] != CORRUPTED]
            self._next_pass([shadow for shadow, _ in going])
        drafts = {shadow.target.request_id: shadow.drafted() for shadow, _ in drafted}
        return [drafts.get(ask.request.request_id, ()) for ask in asks]

    def _first_pass(self, asks: Sequence[Ask]) -> list[tuple[_Shadow, int]]:
        """Compute what waits; who is through with it has the first token of its draft.

        With each of those, how many tokens it may have.
        """
        budget, items, ready = CATCH_UP, [], []
        for ask in asks:
            shadow = self._shadows.get(ask.request.request_id)
            if shadow is None or shadow.target is not ask.request:
                continue
            count = shadow.follow()
            if count > self._block_size:
                count = min(count, budget)
                budget -= count
            if count and self._has_room(shadow, shadow.own.num_behind + ask.num_tokens - 1):
                items.append((shadow, count))
                if count == shadow.own.num_behind:
                    ready.append((shadow, ask.num_tokens))
        self._compute(items)
        return ready

    def _has_room(self, shadow: _Shadow, num_rows: int) -> bool:
        """Take blocks for so many rows more; False if there are too few."""
        own = shadow.own
        end = own.num_computed_tokens + num_rows
        missing = max(0, -(-end // self._block_size) - len(own.block_table))
        if missing > self._pool.num_available:
            return False
        own.block_table += self._pool.allocate(missing, Owner.RUNNING)
        return True

    def _compute(self, counted: Sequence[tuple[_Shadow, int]]) -> None:
        """So many waiting rows of each, from the target's states."""
        taken = [part for shadow, count in counted for part in shadow.waiting.take(count)]
        if taken:
            self._run(counted, self._head.entry.combined(torch.cat(taken)))
        for shadow, count in counted:
            shadow.num_valid += count

    def _next_pass(self, shadows: Sequence[_Shadow]) -> None:
        """One token more for each, from the head's own states."""
        states = [shadow.state for shadow in shadows if shadow.state is not None]
        if states:
            self._run([(shadow, 1) for shadow in shadows], torch.cat(states))

    def _run(self, counted: Sequence[tuple[_Shadow, int]], states: Tensor) -> None:
        items = [ScheduledRequest(s.own, s.own.num_computed_tokens, count) for s, count in counted]
        output = self._runner.prepare(StepPlan(tuple(items)))(states=states)
        at_end = [s for (s, _), item in zip(counted, items, strict=True) if item.samples]
        rows = [Ahead(shadow.target, shadow.drafted()) for shadow in at_end]
        tokens = self._sampler.sample(output.logits.squeeze(0).float(), rows)
        for item in items:
            item.request.num_computed_tokens = item.end
        for index, (shadow, token) in enumerate(zip(at_end, tokens, strict=True)):
            shadow.state = output.states[index : index + 1]
            shadow.own.tokens.append(token)

    def accepted(self, request: Request, num_tokens: int) -> None:
        """See Drafter; the states of the step that computed them tell."""

    @property
    def num_blocks_held(self) -> int:
        return self._pool.num_blocks - self._pool.num_available

    def check_integrity(self) -> None:
        """Raise AssertionError where the blocks of this head are not its requests'."""
        self._pool.check_integrity()
        held = sum(len(shadow.own.block_table) for shadow in self._shadows.values())
        assert held == self.num_blocks_held, f"{held} blocks held, {self.num_blocks_held} taken"


def _may_be_drafted(request: Request) -> bool:
    plain = not request.prefill_only and request.pooling is None
    return plain and request.sampling.speculate and request.sampling.beam is None
