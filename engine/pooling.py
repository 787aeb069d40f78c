"""Embeddings: hidden states of the last layer, after the final norm, pooled over a prompt.

    last   the state at the last token, which has seen all others
    mean   the average over all tokens, summed up chunk by chunk in fp64

What is told has length 1, as OpenAI's and vLLM's embeddings have. A mean needs the state of every
token, so such a request takes nothing from the prefix cache; its blocks enter it all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.plan import StepPlan


@dataclass(frozen=True, slots=True)
class Pooled:
    """What came of a step's states, by request."""

    embeddings: dict[str, bytes]  # of prompts that end with this step: little-endian fp32
    corrupted: frozenset[str]  # have states that are no numbers


NOTHING_POOLED = Pooled({}, frozenset())


def pool_step(plan: StepPlan, hidden: Tensor) -> Pooled:
    """Add a step's states [rows of `plan.hidden_rows`, H] to their requests."""
    items = [item for item in plan.scheduled if item.num_hidden]
    parts = torch.split(hidden, [item.num_hidden for item in items])
    sums = [part.sum(0, dtype=torch.float64) for part in parts]
    found, corrupted = {}, set()
    for item, new in zip(items, sums, strict=True):
        request = item.request
        if not new.isfinite().all():
            corrupted.add(request.request_id)
            continue
        request.pooled = new if item.start == 0 or request.pooled is None else request.pooled + new
        if item.is_last:
            found[request.request_id] = _unit_vector(request.pooled)
    return Pooled(found, frozenset(corrupted))


def _unit_vector(vector: Tensor) -> bytes:
    """The sum's direction is the mean's; a vector of zeros stays one."""
    unit = torch.nn.functional.normalize(vector, dim=0).float().cpu()
    return bytes(unit.numpy().astype("<f4", copy=False).tobytes())
