"""Drafts by a smaller model with the same vocabulary, in KV blocks of its own.

    its KV:  | prompt, output: computed once ..... | draft |      one pass per drafted token
             0                                num_valid  num_written

What the target accepted of the last draft stays computed; the rest is written over. Each token is
sampled as the target will sample it, by the same rules and with the same noise: where the two
models agree on a distribution they agree on the token, at any temperature.

A request whose KV was computed elsewhere is new to this model: it catches up on the prompt here, a
bounded part of it per step, and is drafted from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.block_pool import BlockPool, Owner
from engine.device import give_back_memory, is_out_of_memory
from engine.drafting.drafter import Ask
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler

CATCH_UP = 256
"""Tokens per step that requests who are new here may be computed; a step waits for them."""


@dataclass(slots=True)
class _Shadow:
    """A request as this model knows it."""

    request: Request  # with this model's blocks; its tokens are the target's, then the draft
    num_valid: int = 0  # slots whose content is of known tokens
    num_written: int = 0
    num_known: int = 0  # tokens that the target had when the last draft began

    def follow(self, tokens: list[int]) -> None:
        """The target's tokens, as they are now."""
        mine = self.request.tokens
        del mine[self.num_valid :]
        mine += tokens[self.num_valid :]
        self.request.num_computed_tokens = self.num_valid
        self.num_known = len(tokens)

    def drafted(self) -> tuple[int, ...]:
        return tuple(self.request.tokens[self.num_known :])


class DraftModel:
    """See engine.drafting.drafter.Drafter.

    Args:
        max_model_len: the longest context of this model; longer requests are not drafted.
    """

    method = "draft_model"
    cost_per_token = True

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._pool = BlockPool(num_blocks, epoch=0)
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._shadows: dict[str, _Shadow] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        """See Drafter. Nothing is drafted in a step for which the device has too little memory."""
        self._forget_others({ask.request.request_id for ask in asks})
        try:
            return self._drafts(asks)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            give_back_memory()
            return [()] * len(asks)

    def _drafts(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        ready = self._catch_up([ask for ask in asks if ask.num_tokens])
        for depth in range(2, max((ask.num_tokens for ask in ready), default=0) + 1):
            self._pass([ask for ask in ready if ask.num_tokens >= depth])
        drafts = {ask.request.request_id: self._finish(ask) for ask in ready}
        return [drafts.get(ask.request.request_id, ()) for ask in asks]

    def _forget_others(self, named: set[str]) -> None:
        for request_id in self._shadows.keys() - named:
            self._release(self._shadows.pop(request_id))

    def _release(self, shadow: _Shadow) -> None:
        self._pool.release(shadow.request.block_table, Owner.RUNNING)
        shadow.request.block_table.clear()

    def _catch_up(self, asks: Sequence[Ask]) -> list[Ask]:
        """Compute what is known; for those who got there also the first token of the draft."""
        budget, items, ready = CATCH_UP, [], []
        for ask in asks:
            shadow = self._shadow(ask)
            if shadow is None:
                continue
            request = shadow.request
            behind = request.num_behind
            count = behind if behind <= self._block_size else min(behind, budget)
            budget -= 0 if behind <= self._block_size else count
            if count:
                items.append(ScheduledRequest(request, request.num_computed_tokens, count))
                if count == behind:
                    ready.append(ask)
        self._run(items)
        return ready

    def _shadow(self, ask: Ask) -> _Shadow | None:
        """The request here, with blocks for all that may come; None if there is no room."""
        request_id, target = ask.request.request_id, ask.request
        shadow = self._shadows.get(request_id)
        if shadow is None:
            own = Request(
                request_id=request_id,
                tokens=[],
                num_prompt_tokens=target.num_prompt_tokens,
                sampling=target.sampling,
                max_num_tokens=target.max_num_tokens,
            )
            shadow = self._shadows[request_id] = _Shadow(own)
        end = target.num_tokens + ask.num_tokens
        missing = -(-end // self._block_size) - len(shadow.request.block_table)
        if end > self._max_model_len or missing > self._pool.num_available:
            return None
        shadow.request.block_table += self._pool.allocate(max(0, missing), Owner.RUNNING)
        shadow.follow(target.tokens)
        return shadow

    def _pass(self, asks: Sequence[Ask]) -> None:
        """One token more for each."""
        requests = [self._shadows[ask.request.request_id].request for ask in asks]
        self._run([ScheduledRequest(r, r.num_computed_tokens, 1) for r in requests])

    def _run(self, items: Sequence[ScheduledRequest]) -> None:
        if not items:
            return
        plan = StepPlan(tuple(items))
        sampled = iter(self._sampler.sample(self._runner.run(plan), plan.sampling))
        for item in items:
            request, samples = item.request, item.samples
            request.num_computed_tokens = item.end
            shadow = self._shadows[request.request_id]
            shadow.num_valid = min(item.end, shadow.num_known)
            if samples:
                request.tokens.append(next(sampled))

    def _finish(self, ask: Ask) -> tuple[int, ...]:
        shadow = self._shadows[ask.request.request_id]
        shadow.num_written = shadow.request.num_computed_tokens
        return shadow.drafted()

    def accepted(self, request: Request, num_tokens: int) -> None:
        """See Drafter."""
        shadow = self._shadows.get(request.request_id)
        if shadow is not None:
            shadow.num_valid = min(shadow.num_written, shadow.num_known + num_tokens)

    @property
    def num_blocks_held(self) -> int:
        return self._pool.num_blocks - self._pool.num_available

    def check_integrity(self) -> None:
        """Raise AssertionError where the blocks of this model are not its requests'."""
        self._pool.check_integrity()
        held = sum(len(shadow.request.block_table) for shadow in self._shadows.values())
        assert held == self.num_blocks_held, f"{held} blocks held, {self.num_blocks_held} taken"
