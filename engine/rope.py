"""Fixes rotary frequencies that would follow the longest position of a batch.

longrope and dynamic (NTK) scaling choose their frequencies at every forward pass from the largest
position in it: a long neighbour would change a request's output, and keys already in the cache
would no longer fit. So each such module chooses once, for the longest position that can occur, and
then keeps to it. yarn, llama3 and linear scaling do not look at the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

FIXED = "fixed"
"""A rope type that transformers' update of frequencies does not know and leaves alone."""


def follows_batch(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def fix_frequencies(model: nn.Module, max_model_len: int) -> int:
    """Fix every module of `model` that follows the batch; returns how many there were."""
    fixed = 0
    for module in model.modules():
        rope_type: Any = getattr(module, "rope_type", None)
        if isinstance(rope_type, str) and follows_batch(rope_type):
            _choose(module, max_model_len)
            module.rope_type = FIXED  # type: ignore[assignment]
        elif isinstance(rope_type, dict) and any(map(follows_batch, rope_type.values())):
            for layer_type in (t for t, kind in rope_type.items() if follows_batch(kind)):
                _choose(module, max_model_len, layer_type=layer_type)
            module.rope_type = {  # type: ignore[assignment]
                t: FIXED if follows_batch(kind) else kind for t, kind in rope_type.items()
            }
        else:
            continue
        fixed += 1
    return fixed


def _choose(module: nn.Module, max_model_len: int, **layer_type: str) -> None:
    """Let the module choose its frequencies as for a batch that reaches the last position."""
    buffer = next(module.buffers())
    with torch.no_grad():
        module(buffer, torch.tensor([[max_model_len - 1]], device=buffer.device), **layer_type)
