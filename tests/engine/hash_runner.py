"""A runner without a model: a slot's KV is a hash of all tokens up to it, and so are the logits.

Every step reads all earlier slots of a request through its block table and compares them with what
they must hold, so a block that is stale, shared by mistake, not yet received or out of order is
noticed at its first use. What a request must produce follows from its tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.sampler import Sampler
from engine.step_inputs import with_sampled
from engine.stops import finish_reason
from wire.types import FinishReason

VOCAB_SIZE = 24
_MASK = (1 << 62) - 1


def chain(tokens: Sequence[int]) -> list[int]:
    """What the slots of `tokens` must hold."""
    states, state = [], 17
    for token in tokens:
        state = (state * 6364136223846793005 + token + 1442695040888963407) & _MASK
        state ^= state >> 29
        states.append(state)
    return states


def logits_after(state: int) -> Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(state)) * 2


def hidden_state(state: int) -> Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(state))


class HashRunner:
    """Computes plans on a pool of hashes; `during_run` is called in the middle of each step."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._kv = [[-1] * block_size for _ in range(num_blocks)]
        self.num_layers = 1  # that are reported
        self.during_run: Callable[[], object] = lambda: None

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        for source, target in plan.copied_blocks:
            self.copy(source, target)
        needed = [s for item in plan.scheduled for s in self._compute(item, sampled)]
        if on_hidden is not None:
            on_hidden(self._hidden(plan))
        if on_layers is not None:
            for num_layers in range(1, self.num_layers + 1):
                on_layers(num_layers)
        self.during_run()
        if not needed:
            return torch.empty(0, VOCAB_SIZE)
        return torch.stack([logits_after(state) for state in needed])

    def _hidden(self, plan: StepPlan) -> Tensor:
        rows = []
        for item in plan.scheduled:
            states = chain(item.request.tokens[: item.end])
            rows += [hidden_state(s) for s in states[len(states) - item.num_hidden :]]
        return torch.stack(rows)

    def _compute(self, item: ScheduledRequest, sampled: Tensor | None) -> list[int]:
        request, tokens = item.request, item.new_tokens
        if sampled is not None:
            tokens = with_sampled(torch.tensor(tokens), sampled.as_subclass(Tensor)).tolist()
        states = chain([*request.tokens[: item.start], *tokens])
        for position in range(item.start):
            held = self.read(request.block_table[position // self._block_size], position)
            assert held == states[position], f"{request.request_id} reads a wrong slot {position}"
        self.write(request.block_table, states, item.start)
        return states[item.end - item.num_logits :]

    def copy(self, source: int, target: int) -> None:
        self._kv[target] = list(self._kv[source])

    def read(self, block_id: int, position: int) -> int:
        return self._kv[block_id][position % self._block_size]

    def write(self, block_ids: Sequence[int], states: Sequence[int], start: int) -> None:
        """Fill the slots of positions [start, len(states))."""
        for position in range(start, len(states)):
            block = self._kv[block_ids[position // self._block_size]]
            block[position % self._block_size] = states[position]


def expected_output(
    request: Request, eos_token_ids: frozenset[int]
) -> tuple[list[int], FinishReason | None]:
    """Output tokens and finish reason of `request`, computed alone and one token at a time."""
    sampler = Sampler(eos_token_ids)
    alone = replace(request, tokens=list(request.tokens), block_table=[], block_hashes=[])
    while alone.finish_reason is None:
        logits = logits_after(chain(alone.tokens)[-1]).unsqueeze(0)
        alone.tokens += sampler.sample(logits, [alone])
        alone.finish_reason = finish_reason(alone, eos_token_ids)
    return alone.output_tokens, alone.finish_reason
