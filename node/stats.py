"""Counts of one node's work; exported as metrics."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.plan import StepResult
from telemetry import metrics as names
from telemetry.histogram import Buckets


@dataclass(slots=True)
class NodeStats:
    """Grows from the node's start on."""

    steps: int = 0
    step_tokens: int = 0
    unfinished_chunks: int = 0  # parts of prompts that needed a further step
    output_tokens: int = 0
    preemptions: int = 0
    out_of_memory: int = 0  # steps that were tried again with less in them
    graph_failures: int = 0  # captures that failed at start
    corrupted: int = 0  # requests that ended with broken logits
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # and found there
    tokens_per_step: Buckets = field(default_factory=lambda: Buckets.of(names.ITERATION_TOKENS))
    seconds_per_step: Buckets = field(default_factory=lambda: Buckets.of(names.NODE_STEP_SECONDS))

    def count_step(self, result: StepResult) -> None:
        """A step is done."""
        self.steps += 1
        self.step_tokens += result.num_tokens
        self.tokens_per_step.observe(result.num_tokens)
        self.seconds_per_step.observe(result.seconds)
        self.preemptions += result.num_preempted
        self.out_of_memory += result.num_retries
        self.corrupted += len(result.corrupted)
        for progress in result.progress:
            self.output_tokens += len(progress.new_tokens) + progress.num_beams
            self.unfinished_chunks += not progress.new_tokens and not progress.num_beams

    def count_lookup(self, num_tokens: int, num_found: int) -> None:
        """A prompt was looked up in the prefix cache."""
        self.prefix_queries += num_tokens
        self.prefix_hits += num_found
