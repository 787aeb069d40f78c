"""How often two models draw the same token with the same noise, beside what would be the most.

Classic rejection (Leviathan et al. 2023, section 2.3) accepts a draft with probability 1 - TV(p, q)
on average, and no rule accepts more. Drawing both by Gumbel-max with one noise accepts a little
less, at least (1 - TV) / (1 + TV) (Daliri et al. 2025, theorem 4), but leaves the output what it
would have been without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speculation.rig import BLOCK_SIZE
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from kernels.noise import gumbel, row_keys
from wire.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Coupling:
    """Of the positions of some texts."""

    classic: float  # the mean of 1 - TV: what rejection would accept
    coupled: float  # how often the tokens are the same

    @property
    def share(self) -> float:
        return self.coupled / self.classic


def measure(
    target: LoadedModel,
    draft: LoadedModel,
    texts: Sequence[Sequence[int]],
    temperature: float,
    num_draws: int = 64,
) -> Coupling:
    """Both models on the same texts, position by position."""
    classic: list[Tensor] = []
    same: list[Tensor] = []
    for text in texts:
        p, q = (_log_probs(model, text, temperature) for model in (target, draft))
        classic.append(torch.minimum(p.exp(), q.exp()).sum(-1))
        same += [(_draw(p, seed) == _draw(q, seed)).float() for seed in range(num_draws)]
    return Coupling(float(torch.cat(classic).mean()), float(torch.cat(same).mean()))


def _log_probs(model: LoadedModel, text: Sequence[int], temperature: float) -> Tensor:
    """[tokens, vocabulary]"""
    num_blocks = -(-len(text) // BLOCK_SIZE)
    runner = ModelRunner(model, KVStore(model.kv_layout(BLOCK_SIZE), num_blocks))
    request = Request(
        request_id="text",
        tokens=list(text),
        num_prompt_tokens=len(text),
        sampling=SamplingParams(prompt_logprobs=0),
        max_num_tokens=len(text) + 1,
        prefill_only=True,
        block_table=list(range(num_blocks)),
    )
    logits = runner.run(StepPlan((ScheduledRequest(request, 0, len(text)),)))
    return (logits / temperature).log_softmax(-1)


def _draw(log_probs: Tensor, seed: int) -> Tensor:
    positions = torch.arange(len(log_probs))
    keys = row_keys(torch.full_like(positions, seed), positions)
    ids = torch.arange(log_probs.shape[-1], dtype=torch.int32)
    return (log_probs + gumbel(keys.unsqueeze(1), ids)).argmax(-1)
