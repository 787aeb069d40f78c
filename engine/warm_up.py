"""Runs what later steps will launch, so that no request waits for it.

Triton compiles a kernel when it is first met, for a second or so; libraries load theirs as late.
Which kernel a step takes follows from how many rows its requests have and how long their contexts
are, and changes where these pass some size. Steps of 1, 2, 4, … rows with short and long contexts
therefore meet all of them, whatever the sizes are; so do a few ways to sample. On a later start the
kernels come from Triton's cache.

Whatever is read or written is one block that no request has; the numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from engine.device import synchronize
from engine.gpu_profile import LargestStep
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from wire.types import SamplingParams

MOST_ROWS = 256  # of a request: more than a tile of any kernel holds
GREEDY = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50, ignore_eos=True)
PENALIZED = SamplingParams(
    max_tokens=1, temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.1, ignore_eos=True
)
MIXES = ((GREEDY,), (DRAWN,), (GREEDY, DRAWN), (PENALIZED, DRAWN), (PENALIZED, GREEDY, DRAWN))


def step_shapes(largest: LargestStep) -> Iterator[tuple[int, int]]:
    """(rows, context) of a request: nothing before it, and as much as there may be."""
    rows, longest = 1, largest.max_model_len - 1
    while rows <= min(MOST_ROWS, largest.max_num_batched_tokens, longest):
        yield rows, rows
        if rows < longest:
            yield rows, longest
        rows *= 2


def warm_up(
    runner: ModelRunner,
    sampler: Sampler,
    largest: LargestStep,
    scratch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run each kind of step and of sampling once.

    Args:
        scratch: a block that no request has.
        progress: told how many kinds are done, of how many.
    """
    shapes = list(step_shapes(largest))
    kinds = len(shapes) + len(MIXES)
    for done, (rows, context) in enumerate(shapes):
        progress(done, kinds)
        logits = runner.run(StepPlan((_chunk(rows, context, largest.block_size, scratch),)))
        sampler.sample(logits, [_row(GREEDY)])
    for done, mix in enumerate(MIXES, len(shapes)):
        progress(done, kinds)
        with torch.inference_mode():
            sampler.sample(logits.expand(len(mix), -1).clone(), [_row(kind) for kind in mix])
    synchronize(runner.device)
    progress(kinds, kinds)


def _chunk(rows: int, context: int, block_size: int, scratch: int) -> ScheduledRequest:
    request = Request("warm-up", [0] * context, context, GREEDY, context + 1)
    request.block_table = [scratch] * -(-context // block_size)
    return ScheduledRequest(request, context - rows, rows)


def _row(sampling: SamplingParams) -> Request:
    """Has a token of its prompt and one of its output, for penalties."""
    return Request("warm-up", [0, 1], 1, sampling, 3)
