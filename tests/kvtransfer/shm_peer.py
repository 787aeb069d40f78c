"""The other process of the shm tests: `python -m tests.kvtransfer.shm_peer receive KIND|send URL`.

With `cuda-ipc` behind it the memory is a device's, for which host memory stands.

receive  prints its address, and takes units of any lease into one block until it is killed
send     says so, and sends the blocks of its pool again and again until it is killed
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.cuda_ipc_transport import CudaIpcUnitSender, cuda_ipc_receiver
from kvtransfer.device_pool import HostDeviceMapping, HostDevicePool
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.transport import TransferStats
from tests.kvtransfer.device_memory import at
from wire.handoff_messages import UnitHeader
from wire.types import BlockHandle, NodeId

PREFILL = NodeId("prefill", 1)
DECODE = NodeId("decode", 2)
BLOCK_BYTES = 256 << 10
NUM_BLOCKS = 64


@dataclass
class OneBlock:
    """A sink without leases: everything lands in the same block. Also its own landing."""

    view: memoryview
    landed: int = 0

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> OneBlock:
        return self

    def fill(self, data: memoryview) -> None:
        self.view[:] = data

    def end(self, num_bytes: int) -> None:
        self.landed += 1

    def take(self, source: DeviceBytes, on_over: Callable[[], None]) -> None:
        """As a device does: later, whatever has become of who sent it."""

        def copy() -> None:
            self.view[:] = at(source)
            self.landed += 1
            on_over()

        asyncio.get_running_loop().call_later(0.001, copy)


def header(number: int) -> UnitHeader:
    return UnitHeader(1, b"c" * 16, number, BlockHandle(1, 0, 1), 0, 4, BLOCK_BYTES)


def make_receiver(sink: OneBlock, transport: str) -> ShmUnitReceiver:
    if transport == "shm":
        return ShmUnitReceiver(DECODE, sink, TransferStats())
    return cuda_ipc_receiver(DECODE, sink, TransferStats(), HostDeviceMapping)


Sends = Callable[[str, int, Callable[[], None]], None]


def make_sender(transport: str) -> tuple[ShmUnitSender, Sends, SharedMemory | HostDevicePool]:
    """Its lanes, what sends a unit of block 0 on, and its memory, which is full of fives."""
    size = NUM_BLOCKS * BLOCK_BYTES
    if transport == "shm":
        shared = SharedMemory(size)
        shared.buffer[:] = b"\x05" * size
        sender = ShmUnitSender(PREFILL, shared)

        def send(url: str, number: int, on_done: Callable[[], None]) -> None:
            start = number % NUM_BLOCKS * BLOCK_BYTES
            block = memoryview(shared.buffer)[start : start + BLOCK_BYTES]
            sender.send(url, DECODE, header(number), block, on_done)

        return sender, send, shared
    pool = HostDevicePool(size)
    pool.buffer[:] = b"\x05" * size
    ipc = CudaIpcUnitSender(PREFILL, pool, lambda address, error: None)

    def send_from_device(url: str, number: int, on_done: Callable[[], None]) -> None:
        place = DeviceBytes(pool.address + number % NUM_BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
        ipc.send_from_device(url, DECODE, header(number), place, on_done)

    return ipc._lanes, send_from_device, pool


async def receive(transport: str) -> None:
    sink = OneBlock(memoryview(bytearray(BLOCK_BYTES)))
    receiver = make_receiver(sink, transport)
    print(receiver.address.url, flush=True)
    await asyncio.Event().wait()


async def send(url: str) -> None:
    _, send_unit, _ = make_sender(url.partition(":")[0])
    room = asyncio.Semaphore(32)
    print("sending", flush=True)
    number = 0
    while True:
        await room.acquire()
        send_unit(url, number, room.release)
        number += 1


if __name__ == "__main__":
    asyncio.run(receive(sys.argv[2]) if sys.argv[1] == "receive" else send(sys.argv[2]))
