"""One handoff on its way: which of this node's blocks hold which unit.

The units are parts of the receiver's blocks. Where block sizes differ, a unit lies in several
blocks of this node, or in a part of one; it can leave when the last of them is finished, because a
request's blocks are finished in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from kvtransfer.digest import UnitSealer
from kvtransfer.handoff import Handoff
from kvtransfer.relay import blocks_of
from kvtransfer.transfer_meter import TransferMeter
from kvtransfer.units import Unit, units_of
from wire.errors import TransferError
from wire.geometry import head_groups
from wire.layout import KVLayout
from wire.logprobs import Logprobs
from wire.request_messages import Grant
from wire.types import BlockHandle, TransportAddress

Outputs: TypeAlias = tuple[tuple[int, ...], Logprobs | None]


@dataclass(slots=True)
class Outgoing:
    """A handoff, and where its units come from."""

    handoff: Handoff
    sealer: UnitSealer
    address: TransportAddress
    layout: KVLayout  # of this node
    from_device: bool = False  # its transport reads units where they lie on the device
    meter: TransferMeter = field(default_factory=TransferMeter)
    ends_in: dict[int, list[Unit]] = field(default_factory=dict)  # by the last own block
    table: dict[int, BlockHandle] = field(default_factory=dict)  # own blocks, as far as finished
    sealing: set[int] = field(default_factory=set)  # units whose digests are being computed
    outputs: Outputs | None = None  # the commit's, until all units are sealed

    def __post_init__(self) -> None:
        for unit in self.handoff.units.values():
            self.ends_in.setdefault(blocks_of(unit, self.layout)[-1], []).append(unit)

    def ready_units(
        self, blocks: Iterable[tuple[int, BlockHandle]], num_layers: int
    ) -> Iterator[tuple[Unit, tuple[BlockHandle, ...]]]:
        """Units that are complete now that these blocks are, and the blocks that hold each."""
        for index, handle in blocks:
            self.table[index] = handle  # after a preemption another one than before
            for unit in self.ends_in.get(index, ()):
                if unit.layer_end <= num_layers and self._wants(unit.index):
                    yield unit, tuple(self.table[i] for i in blocks_of(unit, self.layout))

    def _wants(self, index: int) -> bool:
        return self.handoff.wants(index) and index not in self.sealing

    @property
    def dtype(self) -> str:
        """The wire's."""
        return self.handoff.grant.geometry.dtype_for(self.handoff.grant.layout)


def own_units(grant: Grant, num_tokens: int, layout: KVLayout) -> list[Unit]:
    """Of the grant's units, those that a node with this layout has.

    Raises:
        TransferError: they cannot exchange blocks, or the grant is not about these tokens.
    """
    theirs, geometry = grant.layout, grant.geometry
    if not layout.can_exchange(theirs):
        raise TransferError("layout", f"layouts differ: {layout} here, {theirs} there")
    fits = len(grant.handles) == theirs.num_blocks(num_tokens)
    cut = geometry.num_layer_groups <= layout.num_layers
    cut &= geometry.num_head_groups == head_groups(layout, theirs)
    if not fits or not cut or grant.num_cached_tokens % theirs.block_size:
        raise TransferError("refused", "the grant does not fit the request")
    first, end = layout.head_range
    units = units_of(num_tokens, grant.num_cached_tokens, theirs, geometry)
    return [unit for unit in units if first <= unit.head_start and unit.head_end <= end]
