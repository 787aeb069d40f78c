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

SCALED_DTYPES = ("int8", "fp8")
"""One byte per number, and a float32 scale per key or value of one head and token."""

SCALE_BYTES = 4
WIRE_DTYPES = (STORED, *DTYPE_BYTES, *SCALED_DTYPES)
WireDType = Annotated[str, Field(strict=True, pattern=f"^({'|'.join(WIRE_DTYPES)})$")]

MAX_LAYER_GROUPS = 4
MIN_UNIT_BYTES = 128 << 10
"""Each unit costs a header, a digest and two lookups, whatever its size: at 64 KB these weigh as
much as the copy (`docs/log.md`). And a third or a quarter of the last chunk is little to be left
after the last forward pass: of four chunks, a twelfth or a sixteenth."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The cut of every block of one grant."""

    num_layer_groups: Positive = 1
    num_head_groups: Positive = 1  # the ranks of the prefill node that fill one block
    dtype: WireDType = STORED

    def dtype_for(self, layout: KVLayout) -> str:
        """The type on the wire; `layout` is the decode node's."""
        return layout.dtype if self.dtype == STORED else self.dtype

    def vector_bytes(self, layout: KVLayout) -> int:
        """Of one head's key or value of one token on the wire; `layout` is the decode node's."""
        dtype = self.dtype_for(layout)
        if dtype in SCALED_DTYPES:
            return layout.head_dim + SCALE_BYTES
        return layout.head_dim * DTYPE_BYTES[dtype]


WHOLE_BLOCKS = Geometry()


def geometry_for(
    layout: KVLayout, prefill: KVLayout | None = None, transfer_dtype: str = "auto"
) -> Geometry:
    """The cut of a decode node's blocks.

    Args:
        layout: the decode node's.
        prefill: the layout of the node that will fill them; None: the same.
        transfer_dtype: one of SCALED_DTYPES, or auto: the narrower one of what the two store.
    """
    num_ranks = head_groups(prefill or layout, layout)
    slices = layout.block_bytes // num_ranks // MIN_UNIT_BYTES
    groups = max(1, min(layout.num_layers, MAX_LAYER_GROUPS, slices))
    if transfer_dtype == "auto":
        narrower = prefill is not None and DTYPE_BYTES[prefill.dtype] < DTYPE_BYTES[layout.dtype]
        transfer_dtype = prefill.dtype if prefill is not None and narrower else STORED
    return Geometry(groups, num_ranks, transfer_dtype)


def head_groups(prefill: KVLayout, decode: KVLayout) -> int:
    """How many ranks of the prefill node fill one block of this rank of the decode node."""
    return max(1, prefill.tp_size // decode.tp_size)
