"""Blocks of a device that is host memory: only who has an address reads them, and it takes time."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Sequence
from typing import Any

from kvtransfer.block_memory import ArrivedUnit, DeviceBytes, HeldUnit, TellRead, TellWritten
from kvtransfer.device_pool import HostDevicePool
from tests.kvtransfer.slow_pool import SlowPool
from wire.layout import KVLayout


def at(source: DeviceBytes) -> memoryview:
    """What a device finds there."""
    return memoryview((ctypes.c_char * source.nbytes).from_address(source.address)).cast("B")


class DeviceMemory(SlowPool):
    """A slow pool that goes on by itself, unless a test holds it."""

    def __init__(self, layout: KVLayout, num_blocks: int = 64, epoch: int = 1) -> None:
        super().__init__(layout, num_blocks, epoch)
        self.held = False
        self.shared = HostDevicePool(num_blocks * layout.block_bytes)
        whole, size = memoryview(self.shared.buffer), layout.block_bytes
        blocks: list[Any] = [whole[i * size : (i + 1) * size] for i in range(num_blocks)]
        self.blocks = blocks

    def device_bytes(self, block_id: int, part: slice) -> DeviceBytes | None:
        start = self.layout.block_bytes * block_id + part.start
        return DeviceBytes(self.shared.address + start, part.stop - part.start)

    def read(self, units: Sequence[HeldUnit], dtype: str, tell: TellRead, **more: Any) -> None:
        super().read(units, dtype, tell, **more)
        self._go_on_later()

    def write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, *, seed: int
    ) -> None:
        super().write(units, dtype, tell, seed=seed)
        self._go_on_later()

    def _write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, seed: int
    ) -> None:
        found = [
            unit._replace(data=at(unit.data)) if isinstance(unit.data, DeviceBytes) else unit
            for unit in units
        ]
        super()._write(found, dtype, tell, seed)

    def _go_on_later(self) -> None:
        if not self.held:
            asyncio.get_running_loop().call_soon(self.go_on)
