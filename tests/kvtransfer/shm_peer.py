"""The other process of the shm tests: `python -m tests.kvtransfer.shm_peer receive | send URL`.

receive  prints its address, and takes units of any lease into one block until it is killed
send     says so, and sends the blocks of its pool again and again until it is killed
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.transport import TransferStats
from wire.messages import UnitHeader
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


def header(number: int) -> UnitHeader:
    return UnitHeader(1, b"c" * 16, number, BlockHandle(1, 0, 1), 0, 4, BLOCK_BYTES)


async def receive() -> None:
    sink = OneBlock(memoryview(bytearray(BLOCK_BYTES)))
    receiver = ShmUnitReceiver(DECODE, sink, TransferStats())
    print(receiver.address.url, flush=True)
    await asyncio.Event().wait()


async def send(url: str) -> None:
    pool = SharedMemory(NUM_BLOCKS * BLOCK_BYTES)
    pool.buffer[:] = b"\x05" * len(pool)
    sender = ShmUnitSender(PREFILL, pool)
    room = asyncio.Semaphore(32)
    print("sending", flush=True)
    number = 0
    while True:
        await room.acquire()
        block = memoryview(pool.buffer)[number % NUM_BLOCKS * BLOCK_BYTES :][:BLOCK_BYTES]
        sender.send(url, DECODE, header(number), block, room.release)
        number += 1


if __name__ == "__main__":
    asyncio.run(receive() if sys.argv[1] == "receive" else send(sys.argv[2]))
