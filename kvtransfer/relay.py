"""How a unit's numbers lie in blocks, and how they get out of them and into them.

A unit travels in the canonical order [layer, K/V, token, head, dim]. Where a block has all of it in
one piece, in that order and in the wire's type, nothing is copied but by the transport:

    block  [layer | K/V | slot | head | dim]        a layer group of a full block lies in one piece
    unit   [layer | K/V | token | head | dim]

Otherwise the sender gathers (filled slots of a last block, blocks of another size, some of its
heads, another type) and the receiver scatters. Each side knows its own layout and the unit only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtransfer.numbers import STORES, Numbers, decode, encode
from kvtransfer.units import Unit
from wire.layout import KVLayout


def blocks_of(unit: Unit, layout: KVLayout) -> range:
    """Which blocks of a block table hold the unit's tokens."""
    return range(unit.token_start // layout.block_size, layout.num_blocks(unit.token_end))


def place_of(unit: Unit, layout: KVLayout, dtype: str) -> slice | None:
    """Where the unit's bytes lie in its block as they travel; None if not in one piece."""
    whole_block = unit.num_tokens == layout.block_size and len(blocks_of(unit, layout)) == 1
    all_heads = (unit.head_start, unit.head_end) == layout.head_range
    if not whole_block or not all_heads or dtype != layout.dtype:
        return None
    return layers_of(unit, layout)


def layers_of(unit: Unit, layout: KVLayout) -> slice:
    """Where the bytes of the unit's layers lie in each block, whatever else is there."""
    per_layer = layout.block_bytes // layout.num_layers
    return slice(unit.layer_start * per_layer, unit.layer_end * per_layer)


def gather(unit: Unit, layers: Sequence[memoryview], layout: KVLayout, dtype: str) -> memoryview:
    """The unit as it travels: `layers` itself where the unit is all of it, else a copy.

    Args:
        layers: the part `layers_of` of the blocks that `blocks_of` names.
        layout: the one of the blocks.
        dtype: the wire's.
    """
    if place_of(unit, layout, dtype) is not None:
        return layers[0]
    first = blocks_of(unit, layout).start
    parts = [
        _part(unit, part, layout, (first + number) * layout.block_size)
        for number, part in enumerate(layers)
    ]
    return encode(np.concatenate(parts, axis=2), dtype)


def scatter(unit: Unit, data: memoryview, block: memoryview, layout: KVLayout, dtype: str) -> None:
    """Put a unit that has travelled into its slots of `block`."""
    part = _part(unit, block[layers_of(unit, layout)], layout, unit.token_start)
    part[...] = decode(data, part.shape, dtype, layout.dtype)


def _part(unit: Unit, layers: memoryview, layout: KVLayout, block_start: int) -> Numbers:
    """The view of what a block has of the unit, whose first slot holds token `block_start`."""
    numbers = np.frombuffer(layers, STORES[layout.dtype]).reshape(
        unit.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim
    )
    first_head = layout.head_range[0]
    return numbers[
        :,
        :,
        max(0, unit.token_start - block_start) : unit.token_end - block_start,
        unit.head_start - first_head : unit.head_end - first_head,
    ]
