"""Memory of a device that another process of this host reads: what `cuda-ipc` needs of it.

    owner    descriptor ── over a Unix socket ──▶ reader maps it, and copies parts of it

Whoever has the descriptor keeps the memory: a reader's mapping stays valid whatever becomes of the
owner. The implementation for NVIDIA's GPUs is `cuda_memory`. The one here has POSIX memory in the
device's place: same handshake, same lanes, same faults, on a machine without a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.shared_memory import MappedMemory, SharedMemory

ALIGNMENT = 16
"""Of whatever is read: a device that is asked for less ends the process that asked."""


class Pool(Protocol):
    """The owner's side, of host memory (`SharedMemory`) or of a device's."""

    @property
    def descriptor(self) -> int: ...

    def __len__(self) -> int: ...

    def offset_of(self, payload: memoryview | DeviceBytes) -> int | None:
        """Where `payload` lies in this memory; None if it lies elsewhere."""
        ...

    def close(self) -> None:
        """Give it to nobody any more."""
        ...


class ForeignPool(Protocol):
    """The reader's side."""

    @property
    def on_device(self) -> bool:
        """Its parts are DeviceBytes, else views."""
        ...

    @property
    def alignment(self) -> int:
        """Of what may be read."""
        ...

    def __len__(self) -> int: ...

    def part(self, offset: int, num_bytes: int) -> memoryview | DeviceBytes:
        """`num_bytes` of it. `offset` must be within."""
        ...

    def close(self) -> None: ...


OpenPool: TypeAlias = Callable[[int, int], ForeignPool]
"""Of a descriptor, which stays the caller's, and a size. Raises ValueError or OSError."""


class HostDevicePool:
    """Host memory as a device's: nobody here reads it but by its address."""

    def __init__(self, num_bytes: int) -> None:
        """Raises ConfigError where the system has no such memory."""
        self._memory = SharedMemory(num_bytes)
        self.buffer = self._memory.buffer
        self.address = int(np.frombuffer(self.buffer, np.uint8).ctypes.data)

    @property
    def descriptor(self) -> int:
        return self._memory.descriptor

    def __len__(self) -> int:
        return len(self._memory)

    def offset_of(self, payload: memoryview | DeviceBytes) -> int | None:
        """See Pool."""
        return offset_in(self, self.address, payload)

    def close(self) -> None:
        """See Pool."""
        self._memory.close()


class HostDeviceMapping:
    """See ForeignPool."""

    on_device = True
    alignment = ALIGNMENT

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        self._memory = MappedMemory(descriptor, num_bytes)
        with self._memory.part(0, num_bytes) as whole:
            self.address = int(np.frombuffer(whole, np.uint8).ctypes.data)

    def __len__(self) -> int:
        return len(self._memory)

    def part(self, offset: int, num_bytes: int) -> DeviceBytes:
        """See ForeignPool."""
        return DeviceBytes(self.address + offset, num_bytes)

    def close(self) -> None:
        self._memory.close()


def offset_in(pool: Pool, address: int, payload: memoryview | DeviceBytes) -> int | None:
    """Where `payload` lies in a device's memory that starts at `address`."""
    if isinstance(payload, memoryview):
        return None
    offset = payload.address - address
    return offset if 0 <= offset <= len(pool) - payload.nbytes else None
