"""Counts of one node's work; exported as metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.plan import DraftCounts, StepResult, StepShape
from telemetry import metrics as names
from telemetry.histogram import Buckets
from wire.types import StepSums


@dataclass(slots=True)
class NodeStats:
    """Grows from the node's start on."""

    steps: int = 0
    step_tokens: int = 0
    unfinished_chunks: int = 0  # parts of prompts that needed a further step
    output_tokens: int = 0
    preemptions: int = 0
    ahead: int = 0  # steps that were launched before the one before them was read
    out_of_memory: int = 0  # steps that were tried again with less in them
    graph_failures: int = 0  # captures that failed at start
    corrupted: int = 0  # requests that ended with broken logits
    drafts: int = 0
    draft_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)  # draft tokens, by position
    draft_s: float = 0.0
    draft_saved_s: float = 0.0
    drafter_failures: int = 0
    tokens_per_draft: Buckets = field(
        default_factory=lambda: Buckets.of(names.SPEC_TOKENS_PER_STEP)
    )
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # and found there
    tokens_per_step: Buckets = field(default_factory=lambda: Buckets.of(names.ITERATION_TOKENS))
    seconds_per_step: Buckets = field(default_factory=lambda: Buckets.of(names.NODE_STEP_SECONDS))

    prefill_steps: StepSums = field(default_factory=StepSums)  # that only computed prompts
    decode_steps: StepSums = field(default_factory=StepSums)  # that only decoded, without drafts

    def count_step(self, result: StepResult) -> None:
        """A step is done."""
        self.steps += 1
        self.step_tokens += result.num_tokens
        self.tokens_per_step.observe(result.num_tokens)
        self.seconds_per_step.observe(result.seconds)
        self.preemptions += result.num_preempted
        self.ahead += result.was_ahead
        self.out_of_memory += result.num_retries
        self.corrupted += len(result.corrupted)
        for progress in result.progress:
            self.output_tokens += len(progress.new_tokens) + progress.num_beams
            self.unfinished_chunks += not progress.new_tokens and not progress.num_beams
        if result.speculation is not None:
            self._count_drafts(result.speculation)
        if result.speculation is None or not result.speculation.drafts:
            self._sum_up(result.shape, result.seconds)

    def _sum_up(self, shape: StepShape, seconds: float) -> None:
        """Steps of both kinds at once do not tell which part took the time."""
        if not shape.decode_batch and shape.prefill_tokens:
            tokens, squares = shape.prefill_tokens, shape.prefill_squares
            self.prefill_steps = self.prefill_steps.plus(tokens, squares, seconds)
        elif shape.decode_batch and not shape.prefill_tokens:
            context, batch = shape.decode_context, shape.decode_batch
            self.decode_steps = self.decode_steps.plus(context, batch, seconds)

    def _count_drafts(self, counts: DraftCounts) -> None:
        self.draft_s += counts.draft_s
        self.draft_saved_s += counts.saved_s
        self.drafter_failures += bool(counts.failure)
        self.drafts += len(counts.drafts)
        for num_drafted, num_accepted in counts.drafts:
            self.draft_tokens += num_drafted
            self.tokens_per_draft.observe(1 + num_accepted)
            self.accepted_at += [0] * (num_drafted - len(self.accepted_at))
            for position in range(num_accepted):
                self.accepted_at[position] += 1

    def count_lookup(self, num_tokens: int, num_found: int) -> None:
        """A prompt was looked up in the prefix cache."""
        self.prefix_queries += num_tokens
        self.prefix_hits += num_found
