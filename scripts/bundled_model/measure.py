"""What is measured of a trained model: loss, loss by position, and how often a draft is right."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from .data import consecutive_windows, parts

LENGTH = 512
POSITIONS = (0, 256, 512, 1024, 2048)  # bounds of the half-open ranges that are reported

Stream = NDArray[np.uint16]


def held_out_loss(model: Any, stream: Stream, length: int = LENGTH) -> float:
    """Mean nats per token in the model's own precision, in windows of `length`."""
    return float(torch.cat(list(_token_losses(model, stream, length))).mean())


def loss_by_position(model: Any, stream: Stream) -> dict[str, float]:
    """Mean nats per token by how much context came before; it should fall and not rise again."""
    losses = torch.cat(list(_token_losses(model, stream, POSITIONS[-1])))
    return {
        f"{low} to {high - 1}": float(losses[:, low:high].mean())
        for low, high in itertools.pairwise(POSITIONS)
    }


@torch.no_grad()
def agreement(target: Any, draft: Any, stream: Stream) -> tuple[float, float]:
    """How often the draft's best token is the target's, and the mean overlap of both distributions.

    The overlap, the sum of min(p, q), is the acceptance rate of speculative sampling (Leviathan et
    al. 2023, section 3.1).
    """
    same, overlap, count = 0.0, 0.0, 0
    for inputs, _ in _batches(stream, LENGTH, target.device):
        p = target(input_ids=inputs, use_cache=False).logits.float().softmax(-1)
        q = draft(input_ids=inputs, use_cache=False).logits.float().softmax(-1)
        same += float((p.argmax(-1) == q.argmax(-1)).sum())
        overlap += float(torch.minimum(p, q).sum())
        count += inputs.numel()
    return same / count, overlap / count


def bits_per_byte(loss: float, num_tokens: int, num_bytes: int) -> float:
    """What compares models of different tokenizers."""
    return loss * num_tokens / num_bytes / math.log(2)


@torch.no_grad()
def _token_losses(model: Any, stream: Stream, length: int) -> Iterator[torch.Tensor]:
    model.eval()
    for inputs, targets in _batches(stream, length, model.device):
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        yield F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    model.train()


def _batches(
    stream: Stream, length: int, device: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = consecutive_windows(stream, length).to(device)
    for batch in parts(rows, max(2048 // length, 1)):
        yield batch[:, :-1], batch[:, 1:]
