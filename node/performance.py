"""`--performance-mode`: token budget, seats and chunk size that go together.

A step costs about as much as its tokens beyond the first few, so the budget bounds how long a
decoding request waits for a neighbour's prompt, and seats bound how many share a step. A chunk
limit below the budget lets several prompts advance in one step.

    interactivity   short steps: the least time between tokens, small batches
    balanced        the default
    throughput      long steps: the most tokens per second, at the price of each one's latency

On a GPU a step reads all weights whatever it computes, and reading an 8 B model takes as long as
computing some 300 tokens: steps of thousands of tokens are the short ones there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What one step may hold."""

    max_num_batched_tokens: int
    max_num_seqs: int
    long_prefill_token_threshold: int  # of one request; 0: as many as the budget


MODES = {
    "interactivity": StepLimits(256, 16, 128),
    "balanced": StepLimits(512, 64, 0),
    "throughput": StepLimits(2048, 256, 0),
}
GPU_MODES = {
    "interactivity": StepLimits(2048, 64, 1024),
    "balanced": StepLimits(4096, 128, 0),
    "throughput": StepLimits(16384, 512, 0),
}
DEFAULT_MODE = "balanced"


def step_limits(
    mode: str,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    long_prefill_token_threshold: int | None = None,
    *,
    gpu: bool = False,
) -> StepLimits:
    """The mode's limits on a CPU or a GPU, but those that are given."""
    limits = (GPU_MODES if gpu else MODES)[mode]
    given = (max_num_batched_tokens, max_num_seqs, long_prefill_token_threshold)
    own = (
        limits.max_num_batched_tokens,
        limits.max_num_seqs,
        limits.long_prefill_token_threshold,
    )
    return StepLimits(*(o if g is None else g for g, o in zip(given, own, strict=True)))
