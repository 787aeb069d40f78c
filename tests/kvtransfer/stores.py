"""Blocks of any layout that hold what a model would have computed, and what is read from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvtransfer.numbers import STORES
from wire.layout import KVLayout

Model = npt.NDArray[Any]
"""K and V of all tokens: [layer, K/V, token, head, dim], numbers that every store can hold."""


def computed(layout: KVLayout, num_tokens: int, seed: int) -> Model:
    """What a model of this shape (all ranks) computes."""
    num_heads = layout.num_kv_heads * layout.tp_size
    shape = (layout.num_layers, 2, num_tokens, num_heads, layout.head_dim)
    numbers = np.random.default_rng(seed).integers(-100, 100, shape)
    return numbers.astype(np.float32)


def blocks_with(model: Model, layout: KVLayout) -> list[bytearray]:
    """One rank's blocks; slots behind the last token are 111."""
    first, end = layout.head_range
    num_blocks = layout.num_blocks(model.shape[2])
    padded = np.full((*model.shape[:2], num_blocks * layout.block_size, *model.shape[3:]), 111.0)
    padded[:, :, : model.shape[2]] = model
    slots = padded[:, :, :, first:end].astype(STORES[layout.dtype])
    return [bytearray(block.tobytes()) for block in np.split(slots, num_blocks, axis=2)]


def read_back(blocks: list[bytearray], layout: KVLayout) -> Model:
    """All slots of one rank's blocks, as float32."""
    shape = (layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)
    parts = [np.frombuffer(block, STORES[layout.dtype]).reshape(shape) for block in blocks]
    return np.concatenate(parts, axis=2).astype(np.float32)
