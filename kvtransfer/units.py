"""Units: what one digest covers, and how its bytes lie in a block.

A unit is the token range [token_start, token_end) of one block, over all layers and heads, in wire
order (layer, K/V, token, head, dim). A full block is a unit as it lies in memory; of a partly
filled last block only the filled slots travel:

    block  [layer, K/V | slot 0 .. n-1 filled | n .. block_size-1 empty]
    unit   [layer, K/V | slot 0 .. n-1]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wire.layout import KVLayout

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a request: the filled part of the block at index `index` of its block table."""

    index: int
    token_start: int
    token_end: int

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start


def units_of(num_tokens: int, num_cached_tokens: int, layout: KVLayout) -> tuple[Unit, ...]:
    """The units that hold tokens [num_cached_tokens, num_tokens).

    Args:
        num_cached_tokens: what the receiver has already; a multiple of the block size.
    """
    size = layout.block_size
    assert num_cached_tokens % size == 0, "only whole blocks can be cached"
    return tuple(
        Unit(start // size, start, min(start + size, num_tokens))
        for start in range(num_cached_tokens, num_tokens, size)
    )


def unit_bytes(num_tokens: int, layout: KVLayout) -> int:
    """Bytes of a unit of `num_tokens` slots."""
    return num_tokens * layout.bytes_per_token


def gather(block: memoryview, num_tokens: int, layout: KVLayout) -> memoryview:
    """The unit's bytes: the block itself where it is full, else a copy of its filled slots."""
    if num_tokens == layout.block_size:
        return block
    filled = np.ascontiguousarray(_slots(block, layout)[:, :num_tokens])
    return filled.reshape(-1).data


def scatter(unit: memoryview, block: memoryview, num_tokens: int, layout: KVLayout) -> None:
    """Put the bytes of a partial unit into the first slots of `block`."""
    source = np.frombuffer(unit, np.uint8).reshape(layout.num_layers * 2, num_tokens, -1)
    _slots(block, layout)[:, :num_tokens] = source


def _slots(block: memoryview, layout: KVLayout) -> Bytes:
    """`block` as [layer x K/V, slot, bytes of one slot]."""
    array: Bytes = np.frombuffer(block, np.uint8)
    return array.reshape(layout.num_layers * 2, layout.block_size, -1)
