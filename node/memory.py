"""The engine's blocks as a transfer sees them (see kvtransfer.transport.BlockMemory)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.engine import Engine
from engine.kv_store import KVStore
from engine.staging import Staging
from kvtransfer.transport import InPlace
from wire.layout import KVLayout
from wire.types import BlockHandle


@dataclass(frozen=True)
class _EnginesBlocks:
    """Whose blocks they are, and who may touch them."""

    engine: Engine
    store: KVStore

    @property
    def layout(self) -> KVLayout:
        return self.store.layout

    def begin_io(self, handle: BlockHandle) -> bool:
        return self.engine.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        self.engine.end_io(handle)


@dataclass(frozen=True)
class NodeMemory(_EnginesBlocks, InPlace):
    """Blocks in the processor's memory."""

    max_sending_bytes = 0  # nothing is copied, so nothing is short

    def block_bytes(self, block_id: int) -> memoryview:
        return self.store.block_bytes(block_id)


@dataclass(frozen=True)
class StagedMemory(_EnginesBlocks):
    """Blocks on a device, which travel through host memory."""

    staging: Staging

    @property
    def max_sending_bytes(self) -> int:
        """Half of the regions: the other half is for what is sealed or lands, and for gaps."""
        return self.staging.num_bytes // 2

    def part_bytes(self, block_id: int, part: slice) -> memoryview:
        return self.staging.read(block_id, part)

    def room_for(self, block_id: int, part: slice) -> memoryview:
        return self.staging.room(part.stop - part.start)

    def written(self, block_id: int, part: slice, data: memoryview) -> None:
        self.staging.write(block_id, part, data)
