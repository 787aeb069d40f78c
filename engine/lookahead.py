"""Looking ahead: the next step is planned and launched while the present one is computed.

    host     plan 1 │ plan 2 │ commit 1 · plan 3 │ commit 2 · plan 4 │
    device          │ step 1 ········│ step 2 ········│ step 3 ········│

A step's tokens are read when the next one is launched, so the device never waits for the host. The
next one is planned as if they were known: it takes them where they were sampled, on the device.
Who turns out to be over leaves with the step that was launched for nothing: its row is never told,
and its blocks are its own until then.

Some steps cannot be looked beyond: what follows depends on which tokens they sample, or somebody
waits for their end. Then this step is finished before the next one is planned, as without looking
ahead; nobody's tokens differ.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.penalties import penalizes
from engine.plan import ScheduledRequest, StepPlan


def is_handed_off(item: ScheduledRequest) -> bool:
    """A prompt for another node, or an embedding: the sooner it is told, the better."""
    return item.request.prefill_only


def searches(item: ScheduledRequest) -> bool:
    """A beam search: its tokens decide which rows there are."""
    return item.request.sampling.beam is not None


def drafts(item: ScheduledRequest) -> bool:
    """Who knows how many draft tokens are accepted?"""
    return bool(item.draft_tokens)


def follows_grammar(item: ScheduledRequest) -> bool:
    """What may come next is computed from the token, on the host."""
    return item.samples and bool(item.request.sampling.grammar)


def counts_tokens(item: ScheduledRequest) -> bool:
    """Penalties are for tokens that the host has counted."""
    return item.samples and penalizes(item.request.sampling)


def tells_logprobs(item: ScheduledRequest) -> bool:
    """They are read from logits, which the next step overwrites."""
    request = item.request
    return request.wants_prompt_logprobs or (item.samples and request.num_top_logprobs is not None)


def begins_with_copy(item: ScheduledRequest) -> bool:
    """The block that is copied may be somebody else's once this step is over."""
    return item.request.copied_block is not None


OBSTACLES: tuple[Callable[[ScheduledRequest], bool], ...] = (
    is_handed_off,
    searches,
    drafts,
    follows_grammar,
    counts_tokens,
    tells_logprobs,
    begins_with_copy,
)


def can_look_beyond(plan: StepPlan) -> bool:
    """Whether the next step can be planned before this one is over."""
    return not any(obstacle(item) for item in plan.scheduled for obstacle in OBSTACLES)
