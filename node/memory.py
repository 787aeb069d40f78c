"""The engine's blocks in the processor's memory, as a transfer sees them (see BlockMemory)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.engine import Engine
from engine.kv_store import KVStore
from kvtransfer.block_memory import InPlace
from wire.layout import KVLayout
from wire.types import BlockHandle


@dataclass(frozen=True)
class NodeMemory(InPlace):
    """See BlockMemory; `staged_memory` is for those of a device."""

    engine: Engine
    store: KVStore

    max_sending_bytes = 0  # nothing is copied, so nothing is short
    num_unstaged = 0

    @property
    def layout(self) -> KVLayout:
        return self.store.layout

    def begin_io(self, handle: BlockHandle) -> bool:
        return self.engine.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        self.engine.end_io(handle)

    def block_bytes(self, block_id: int) -> memoryview:
        return self.store.block_bytes(block_id)
