"""Penalties for what has been said: the tokens of all rows that have some, as one flat list.

One call serves the whole batch, because on a GPU each call and each copy to it costs the same for a
token as for thousands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.rows import Row
from kernels.ops import LayerOps
from wire.types import SamplingParams


def penalizes(sampling: SamplingParams) -> bool:
    """Whether the request has a penalty."""
    counted = sampling.frequency_penalty or sampling.presence_penalty
    return bool(counted or sampling.repetition_penalty != 1)


def penalize(logits: Tensor, requests: Sequence[Row], ops: LayerOps) -> None:
    """Apply all penalties to the rows [R, V] of these requests, in place."""
    entries = [
        (row, *entry)
        for row, request in enumerate(requests)
        if penalizes(request.sampling)
        for entry in _entries(request, logits.shape[-1])
    ]
    if not entries:
        return
    rows, ids, counts = torch.tensor(entries, device=logits.device).T.contiguous()
    weights = [
        (s.repetition_penalty, s.frequency_penalty, s.presence_penalty)
        for s in (request.sampling for request in requests)
    ]
    ops.penalize(logits, rows, ids, counts, *logits.new_tensor(weights).T.contiguous())


def _entries(request: Row, vocab_size: int) -> list[tuple[int, int]]:
    """Each token that it has seen, once, and how often that is in its output."""
    counts = Counter(request.output_tokens)
    repeats = request.sampling.repetition_penalty != 1
    seen = set(request.tokens) if repeats else counts.keys()
    return [(i, counts[i]) for i in seen if i < vocab_size]  # others can never be sampled
