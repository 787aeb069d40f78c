"""A step that was given to the device and may still be computed: what comes back of it, and when.

    launch: run → sample ──▶ InFlight ──▶ outcome: waits for this step, and for no later one

The tokens begin their way to the host with the launch. Until they are there the next step may be
launched: it finds them on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from engine.logprobs import corrupted_prompts, step_logprobs
from engine.plan import StepPlan
from engine.pooling import NOTHING_POOLED, pool_step
from engine.rows import CORRUPTED
from wire.logprobs import Logprobs


class Runner(Protocol):
    """Executes a plan on a model and its KV pool."""

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        """Each request's last `num_logits` rows in the plan's order, fp32 [rows, vocabulary].

        Where there is a device it may still be computing then. The logits are valid until the next
        call, and only for what that device does.

        Args:
            on_layers: is told from within the forward pass how many layers have written the KV of
                all the plan's tokens to memory.
            on_hidden: is given the last layer's hidden states after the final norm, of
                `plan.hidden_rows`, fp32 [rows, hidden size].
            sampled: what the step before this one sampled, where the plan has tokens that are
                known only on the device (see ScheduledRequest.new_tokens).
        """
        ...


class Arriving(Protocol):
    """Sampled tokens on their way to the host."""

    def wait(self) -> list[int]:
        """The tokens, once the device has done all that it was given before they were sent."""
        ...


class TokenCopy:
    """See Arriving: a copy into pinned memory; on a CPU the tokens are there."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens, self._event = tokens, None
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tokens.device))

    def wait(self) -> list[int]:
        """See Arriving."""
        if self._event is not None:
            self._event.synchronize()
        return [int(token) for token in self._tokens.tolist()]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step computed, on the host."""

    tokens: list[int]
    logprobs: dict[str, Logprobs]  # by request
    embeddings: dict[str, bytes]  # by request
    corrupted: frozenset[str]  # requests whose logits or states are no numbers


@dataclass(frozen=True, slots=True)
class InFlight:
    """One launched step.

    Args:
        logits: as the runner gave them; None where nothing is told of them, and the next step may
            be launched before this one is over.
        hidden: one tensor of states, if the plan has rows to pool.
        sampled: int64 [rows that are sampled], on the device.
    """

    plan: StepPlan
    logits: Tensor | None
    hidden: list[Tensor]
    sampled: Tensor
    arriving: Arriving = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arriving", TokenCopy(self.sampled))

    def outcome(self) -> Outcome:
        """Waits for the sampled tokens."""
        plan, tokens = self.plan, self.arriving.wait()
        corrupted, logprobs = _corrupted(plan, tokens), {}
        if self.logits is not None:
            corrupted |= corrupted_prompts(plan, self.logits)
            logprobs = step_logprobs(plan, self.logits, tokens, corrupted)
        pooled = pool_step(plan, self.hidden[0]) if self.hidden else NOTHING_POOLED
        return Outcome(tokens, logprobs, pooled.embeddings, corrupted | pooled.corrupted)


def _corrupted(plan: StepPlan, tokens: list[int]) -> frozenset[str]:
    """The requests of the step whose last known token has logits that are no numbers."""
    found, row = set(), 0
    for item in plan.scheduled:
        if item.samples and tokens[row] == CORRUPTED:
            found.add(item.request.owner.request_id)
        row += item.num_samples
    return frozenset(found)
