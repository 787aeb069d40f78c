"""How the blocks of a grant are cut into units, and in which type their numbers travel.

A unit is (token range of one block, layer group, kv-head range). The decode node decides: the
units are parts of its own blocks, and both ends compute the same list from the grant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wire.layout import DTYPE_BYTES, KVLayout
from wire.types import Positive

STORED = "stored"
"""The numbers travel as the decode node stores them."""

WIRE_DTYPES = (STORED, *DTYPE_BYTES)
WireDType = Annotated[str, Field(strict=True, pattern=f"^({'|'.join(WIRE_DTYPES)})$")]

MAX_LAYER_GROUPS = 6
MIN_UNIT_BYTES = 64 << 10
"""Each unit costs a header, a digest and two lookups, whatever its size: below 64 KB these weigh
as much as the bytes. And after the last forward pass a sixth of the last chunk is little."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The cut of every block of one grant."""

    num_layer_groups: Positive = 1
    num_head_groups: Positive = 1  # the ranks of the prefill node that fill one block
    dtype: WireDType = STORED


WHOLE_BLOCKS = Geometry()


def geometry_for(layout: KVLayout) -> Geometry:
    """The cut of a decode node's blocks."""
    most = min(layout.num_layers, MAX_LAYER_GROUPS, layout.block_bytes // MIN_UNIT_BYTES)
    return Geometry(num_layer_groups=max(1, most))
