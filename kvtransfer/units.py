"""Units: what one digest covers.

A unit is the token range [token_start, token_end) of one block of the receiver, in the layers
[layer_start, layer_end), of the kv heads [head_start, head_end). Layers and heads are counted over
the whole model. The grant says how each block is cut, so both ends number the units alike:

    block 0                        block 1
    | layers 0-3 | layers 4-7 |    | layers 0-3 | layers 4-7 |    ...
    unit 0         unit 1          unit 2         unit 3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, product

from wire.geometry import WHOLE_BLOCKS, Geometry
from wire.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a request."""

    index: int  # in the list of all units of the request, cached ones included
    block: int  # in the receiver's block table
    token_start: int
    token_end: int
    layer_start: int
    layer_end: int
    head_start: int
    head_end: int

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start


def units_of(
    num_tokens: int,
    num_cached_tokens: int,
    layout: KVLayout,
    geometry: Geometry = WHOLE_BLOCKS,
) -> tuple[Unit, ...]:
    """The units that hold tokens [num_cached_tokens, num_tokens), in the order of their index.

    Args:
        num_cached_tokens: what the receiver has already; a multiple of the block size.
        layout: the receiver's.
    """
    size = layout.block_size
    assert num_cached_tokens % size == 0, "only whole blocks can be cached"
    first_head, end_head = layout.head_range
    layers = list(pairwise(bounds(0, layout.num_layers, geometry.num_layer_groups)))
    heads = list(pairwise(bounds(first_head, end_head, geometry.num_head_groups)))
    cuts = list(product(layers, heads))
    return tuple(
        Unit(block * len(cuts) + number, block, start, end, *layer_range, *head_range)
        for block, start, end in _blocks(num_cached_tokens, num_tokens, size)
        for number, (layer_range, head_range) in enumerate(cuts)
    )


def bounds(start: int, end: int, num_parts: int) -> tuple[int, ...]:
    """Where [start, end) is cut into parts of about the same length."""
    return tuple(start + (end - start) * part // num_parts for part in range(num_parts + 1))


def _blocks(start: int, end: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Index, first and end token of each block."""
    for first in range(start, end, size):
        yield first // size, first, min(first + size, end)


def unit_bytes(unit: Unit, layout: KVLayout, geometry: Geometry = WHOLE_BLOCKS) -> int:
    """Bytes of a unit as it travels; `layout` is the receiver's."""
    vectors = unit.num_layers * 2 * unit.num_tokens * unit.num_heads
    return vectors * geometry.vector_bytes(layout)
