"""GPU memory that other processes of this host may read: the virtual memory calls of CUDA's driver.

    owner    cuMemCreate ─▶ cuMemMap, read and write     cuMemExportToShareableHandle ─▶ descriptor
    reader   cuMemImportFromShareableHandle ─▶ cuMemMap, read only

Why not cudaIpcGetMemHandle: freeing such memory before every reader has closed it is undefined
behaviour, and a killed owner frees it. Memory of these calls is counted: it is freed "when all
outstanding mappings to the memory are unmapped and when all outstanding references to the handle
(including its shareable counterparts) are also released" (cuMemRelease). So an owner that dies
takes nothing from under its readers. A descriptor is also given by whoever has it, to whom it is
meant for, in containers too; and where the driver has read-only mappings, a reader cannot write.

torch's allocator makes no such memory by default, so the pool's is made here, and a tensor is laid
over it (`engine.device.tensor_at`). It lives as long as the process.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_ushort, c_void_p, sizeof
from typing import Any

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.device_pool import ALIGNMENT, offset_in
from wire.errors import ConfigError

log = logging.getLogger(__name__)

_PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
_FILE_DESCRIPTOR = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
_MINIMUM = 0  # CU_MEM_ALLOC_GRANULARITY_MINIMUM
_READ, _READ_WRITE = 1, 3  # CU_MEM_ACCESS_FLAGS_PROT_
_NOT_SUPPORTED = 801  # CUDA_ERROR_NOT_SUPPORTED


class _Location(ctypes.Structure):
    _fields_ = (("type", c_int), ("id", c_int))


class _Flags(ctypes.Structure):
    _fields_ = (
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class _Allocation(ctypes.Structure):
    """CUmemAllocationProp"""

    _fields_ = (
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("win32", c_void_p),
        ("flags", _Flags),
    )


class _Access(ctypes.Structure):
    """CUmemAccessDesc"""

    _fields_ = (("location", _Location), ("flags", c_int))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuMemGetAllocationGranularity": (c_void_p, c_void_p, c_int),
    "cuMemCreate": (c_void_p, c_size_t, c_void_p, c_uint64),
    "cuMemAddressReserve": (c_void_p, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemSetAccess": (c_uint64, c_size_t, c_void_p, c_size_t),
    "cuMemExportToShareableHandle": (c_void_p, c_uint64, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (c_void_p, c_void_p, c_int),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemRelease": (c_uint64,),
    "cuGetErrorString": (c_int, c_void_p),
}


class CudaError(OSError):
    """A call of the driver failed."""


class CudaDriver:
    """The calls, each of which raises CudaError.

    Args:
        library: libcuda, or what stands in for it.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
        self("cuInit", 0)

    def __call__(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise CudaError(code, f"{name}: {(text.value or b'unknown error').decode()}")


@functools.cache
def driver() -> CudaDriver:
    """The one of this machine. Raises CudaError where there is none."""
    try:
        return CudaDriver(ctypes.CDLL("libcuda.so.1"))
    except (OSError, AttributeError) as error:  # too old: a call is missing
        raise CudaError(f"no usable CUDA driver: {error}") from error


class CudaPool:
    """See kvtransfer.device_pool.Pool: memory of one GPU, which this process reads and writes."""

    def __init__(self, device: int, num_bytes: int, calls: CudaDriver | None = None) -> None:
        """Raises ConfigError where the GPU has no such memory (left)."""
        try:
            self._calls = calls or driver()
            wanted = _Allocation(_PINNED, _FILE_DESCRIPTOR, _Location(_ON_DEVICE, device))
            step = c_size_t()
            self._calls("cuMemGetAllocationGranularity", byref(step), byref(wanted), _MINIMUM)
            self._num_bytes = -(-num_bytes // step.value) * step.value
            handle = c_uint64()
            self._calls("cuMemCreate", byref(handle), self._num_bytes, byref(wanted), 0)
            try:
                self.address = _map(self._calls, handle, self._num_bytes, device, _READ_WRITE)
                self.descriptor = self._export(handle)
            finally:
                self._calls("cuMemRelease", handle)  # the mapping keeps it
        except CudaError as error:
            raise ConfigError(
                f"no GPU memory that other processes may read ({error.strerror or error}); "
                "use --transport shm,zmq"
            ) from error

    def _export(self, handle: c_uint64) -> int:
        descriptor = c_int(-1)
        try:
            kind = _FILE_DESCRIPTOR
            self._calls("cuMemExportToShareableHandle", byref(descriptor), handle, kind, 0)
        except CudaError:
            _unmap(self._calls, self.address, self._num_bytes)
            raise
        os.set_inheritable(descriptor.value, False)
        return descriptor.value

    def __len__(self) -> int:
        return self._num_bytes

    def offset_of(self, payload: memoryview | DeviceBytes) -> int | None:
        """See Pool."""
        return offset_in(self, self.address, payload)

    def close(self) -> None:
        """See Pool."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class CudaMapping:
    """See kvtransfer.device_pool.ForeignPool: another process's, read by one GPU of this one."""

    on_device = True
    alignment = ALIGNMENT

    def __init__(
        self, descriptor: int, num_bytes: int, *, device: int, calls: CudaDriver | None = None
    ) -> None:
        """Raises CudaError where it is no such memory, is smaller, or this GPU cannot read it."""
        self._calls = calls or driver()
        self._num_bytes = num_bytes
        handle = c_uint64()
        found = c_void_p(descriptor)  # by value, in a pointer's place
        self._calls("cuMemImportFromShareableHandle", byref(handle), found, _FILE_DESCRIPTOR)
        try:
            self._address = self._mapped(handle, device)
        finally:
            self._calls("cuMemRelease", handle)

    def _mapped(self, handle: c_uint64, device: int) -> int:
        try:
            return _map(self._calls, handle, self._num_bytes, device, _READ)
        except CudaError as error:
            if error.errno != _NOT_SUPPORTED:
                raise
        log.info("this driver maps no GPU memory read-only")
        return _map(self._calls, handle, self._num_bytes, device, _READ_WRITE)

    def __len__(self) -> int:
        return self._num_bytes

    def part(self, offset: int, num_bytes: int) -> DeviceBytes:
        """See ForeignPool."""
        return DeviceBytes(self._address + offset, num_bytes)

    def close(self) -> None:
        """Nothing of it must be read any more."""
        if self._address:
            _unmap(self._calls, self._address, self._num_bytes)
            self._address = 0


def _map(calls: CudaDriver, handle: c_uint64, num_bytes: int, device: int, rights: int) -> int:
    """The memory's address for this process and `device`."""
    address = c_uint64()
    calls("cuMemAddressReserve", byref(address), num_bytes, 0, 0, 0)
    try:
        calls("cuMemMap", address, num_bytes, 0, handle, 0)
        try:
            access = _Access(_Location(_ON_DEVICE, device), rights)
            calls("cuMemSetAccess", address, num_bytes, byref(access), 1)
        except CudaError:
            calls("cuMemUnmap", address, num_bytes)
            raise
    except CudaError:
        calls("cuMemAddressFree", address, num_bytes)
        raise
    return address.value


def _unmap(calls: CudaDriver, address: int, num_bytes: int) -> None:
    try:
        calls("cuMemUnmap", address, num_bytes)
        calls("cuMemAddressFree", address, num_bytes)
    except CudaError as error:  # a lost device; who computes on it ends the process
        log.warning("GPU memory of another process stays mapped: %s", error)


assert (sizeof(_Allocation), sizeof(_Access)) == (32, 12), "not as in cuda.h"
