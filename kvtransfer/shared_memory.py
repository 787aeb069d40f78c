"""A block pool's memory that another process of this host may read, and nobody else may write.

It is a memfd: no name, no file, and gone with the last process that has it. Its seals hold for
whoever gets the descriptor, however he opens it again: it cannot be resized (reading beyond the end
of a shrunk mapping would kill the reader), and no writable mapping can be added to the owner's own.
"""

from __future__ import annotations

import fcntl
import functools
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvtransfer.block_memory import DeviceBytes
from wire.errors import ConfigError

_SEAL_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE of linux/fcntl.h, since Linux 5.1
_FIXED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class SharedMemory:
    """The owner's side: a writable mapping, and a read-only descriptor to give away.

    Pages cost nothing until they are written. The mapping lives as long as anything views it.
    """

    def __init__(self, num_bytes: int) -> None:
        """Raises ConfigError where the system has no such memory."""
        try:
            descriptor = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except (AttributeError, OSError) as error:
            raise ConfigError(f"no shared memory here ({error}); use --transport zmq") from error
        try:
            os.ftruncate(descriptor, num_bytes)
            self.buffer = mmap.mmap(descriptor, num_bytes)
            seals = _FIXED_SIZE | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
            path = f"/proc/self/fd/{descriptor}"
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise ConfigError(f"no shared memory here ({error}); use --transport zmq") from error
        finally:
            os.close(descriptor)
        self._address = np.frombuffer(self.buffer, np.uint8).ctypes.data

    def __len__(self) -> int:
        return len(self.buffer)

    def offset_of(self, payload: memoryview | DeviceBytes) -> int | None:
        """Where `payload` lies in this memory; None if it lies elsewhere."""
        if isinstance(payload, DeviceBytes):
            return None
        offset = int(np.frombuffer(payload, np.uint8).ctypes.data) - self._address
        return offset if 0 <= offset <= len(self.buffer) - payload.nbytes else None

    def close(self) -> None:
        """Give it to nobody any more."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class MappedMemory:
    """The reader's side: another process's memory, read-only."""

    on_device = False
    alignment = 1

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        """Map it. The descriptor stays the caller's.

        Raises:
            ValueError: this is no memory that can be read without risk.
            OSError: the system refuses.
        """
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size != num_bytes or not num_bytes:
            raise ValueError(f"not a memory of {num_bytes} bytes")
        if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _FIXED_SIZE != _FIXED_SIZE:
            raise ValueError("a memory that its owner could shrink")
        self._map = mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ)
        self._view = memoryview(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def part(self, offset: int, num_bytes: int) -> memoryview:
        """`num_bytes` of it; the caller releases the view. `offset` must be within."""
        return self._view[offset : offset + num_bytes]

    def close(self) -> None:
        self._view.release()
        with suppress(BufferError):  # somebody still reads: then it ends with the last view
            self._map.close()


@functools.cache  # asked for every handoff, also when no file can be opened any more
def host_id() -> str:
    """The same for two processes that can reach each other's abstract sockets, and for no others.

    These belong to one run of one kernel and one network namespace.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}.{Path('/proc/self/ns/net').stat().st_ino:x}"
