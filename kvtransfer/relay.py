"""How a unit's bytes lie in a block, and how they get out of it and into it.

A unit travels in the canonical order [layer, K/V, token, head, dim]. Where a block has the unit's
bytes in one piece and in that order, nothing is copied but by the transport:

    block  [layer | K/V | slot | head | dim]        a layer group of a full block lies in one piece
    unit   [layer | K/V | token | head | dim]

Otherwise the sender gathers (filled slots of a last block) and the receiver scatters.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvtransfer.units import Unit
from wire.layout import KVLayout

Slots: TypeAlias = npt.NDArray[Any]
"""A block as [layer, K/V, slot, head, bytes of one head]."""


def place_of(unit: Unit, layout: KVLayout) -> slice | None:
    """Where the unit's bytes lie in their block, if they do in one piece and in wire order."""
    if unit.num_tokens != layout.block_size:
        return None
    per_layer = layout.block_bytes // layout.num_layers
    return slice(unit.layer_start * per_layer, unit.layer_end * per_layer)


def gather(unit: Unit, block: memoryview, layout: KVLayout) -> memoryview:
    """The unit's bytes: a part of the block itself where they lie in one piece, else a copy."""
    place = place_of(unit, layout)
    if place is not None:
        return block[place]
    return np.ascontiguousarray(_part(unit, block, layout)).reshape(-1).data


def scatter(unit: Unit, data: memoryview, block: memoryview, layout: KVLayout) -> None:
    """Put the bytes of a unit into its slots of `block`."""
    part = _part(unit, block, layout)
    part[...] = np.frombuffer(data, np.uint8).reshape(part.shape)


def _part(unit: Unit, block: memoryview, layout: KVLayout) -> Slots:
    slots = np.frombuffer(block, np.uint8).reshape(
        layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.bytes_per_head
    )
    return slots[unit.layer_start : unit.layer_end, :, : unit.num_tokens]
