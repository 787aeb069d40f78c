"""Distillation: the draft learns the target's whole distribution, partly on the target's own text.

Speculation proposes continuations of what the target wrote, so windows of text sampled from the
target are mixed into the corpus (as in Zhou et al. 2023, DistillSpec).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import GenerationConfig

from .data import Mixture, Streams
from .train import DECAY_SHARES, LossFunction, Recipe, forward

PROMPT_TOKENS = 32
SAMPLED_TOKENS = 224
TEMPERATURE = 0.8
SHARES = {"library": 0.50, "chat": 0.20, "everyday": 0.05, "sampled": 0.25}


def distillation_loss(target: Any, draft: Any, recipe: Recipe) -> LossFunction:
    """Mean KL(target || draft) in nats per token."""

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        inputs = batch[:, :-1]
        with torch.no_grad():
            wanted = forward(target, inputs, recipe).log_softmax(-1)
        got = forward(draft, inputs, recipe).log_softmax(-1)
        rows = got.flatten(0, 1), wanted.flatten(0, 1)
        return F.kl_div(*rows, reduction="batchmean", log_target=True)

    return loss_of


@torch.no_grad()
def sample_stream(
    target: Any, streams: Streams, num_tokens: int, rows: int = 64
) -> NDArray[np.uint16]:
    """Text that the target wrote after prompts of the corpus, one sample after the other."""
    target.eval()
    prompts = Mixture(streams, DECAY_SHARES, seed=1)
    samples: list[NDArray[np.uint16]] = []
    for step in range(-(-num_tokens // (rows * SAMPLED_TOKENS))):
        batch = prompts.batch(step, rows, PROMPT_TOKENS - 1).to(target.device)
        tokens = target.generate(batch, _sampling(), attention_mask=torch.ones_like(batch))
        samples.append(tokens.cpu().numpy().astype(np.uint16).ravel())
    return np.concatenate(samples)


def _sampling() -> Any:
    """Goes on past the end of a text, as the corpus does."""
    return GenerationConfig(
        do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=SAMPLED_TOKENS
    )
