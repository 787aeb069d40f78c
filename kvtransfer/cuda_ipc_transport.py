"""Units between GPUs of two processes of one host: the decode node copies from device to device.

    prefill node                                decode node
    pool ─────── descriptor ──────────────────▶ maps it                          once per connection
    unit ─────── header and its place ────────▶ lease? copy on a stream of its own, digest, scatter
    on_done ◀─── so many more are over ──────── when an event says that it is done

The connection, the headers and the answers are those of `shm`; the pool is a device's
(`device_pool`, `cuda_memory`). A unit that does not lie in one piece in its block travels inline
behind its header.

What holds for `shm` holds here. A lost connection ends all sends on it, though the decode node's
device may be reading at that very moment: it reads mapped memory, whoever has died, and if a block
was reused under its eyes, the digest of its own copy is not the one that was sealed. The mapping
ends when nothing reads it any more (`late_units`).

A decode node that cannot map the pool (another GPU without a way between them) ends the connection.
Its address is one life's, so that way is not tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.device_pool import OpenPool, Pool
from kvtransfer.shm_receiver import ShmUnitReceiver
from kvtransfer.shm_sender import ShmUnitSender
from kvtransfer.transport import OnLost, TransferStats, UnitSink
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

NAME = "cuda-ipc"
_MAX_LOST = 1024  # ways that are remembered


class CudaIpcUnitSender:
    """See UnitSender and DeviceUnitSender.

    Args:
        pool: the memory that the blocks lie in.
    """

    def __init__(
        self,
        me: NodeId,
        pool: Pool,
        on_lost: OnLost,
        *,
        stall_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._told = on_lost
        self._lost_urls: set[str] = set()
        self._lanes = ShmUnitSender(
            me, pool, name=NAME, on_lost=self._lost, stall_s=stall_s, clock=clock
        )

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender."""
        return url not in self._lost_urls and self._lanes.reaches(url, to)

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        """See UnitSender: inline."""
        self._lanes.send(url, to, header, payload, on_done)

    def send_from_device(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        source: DeviceBytes,
        on_done: Callable[[], None],
    ) -> None:
        """See DeviceUnitSender."""
        self._lanes.send(url, to, header, source, on_done)

    def close(self) -> None:
        self._lanes.close()

    def _lost(self, address: TransportAddress, error: TransferError) -> None:
        if len(self._lost_urls) >= _MAX_LOST:
            self._lost_urls.clear()
        self._lost_urls.add(address.url)
        self._told(address, error)


def cuda_ipc_receiver(
    me: NodeId, sink: UnitSink, stats: TransferStats, open_pool: OpenPool
) -> ShmUnitReceiver:
    """The decode node's end."""
    return ShmUnitReceiver(me, sink, stats, name=NAME, open_pool=open_pool)
