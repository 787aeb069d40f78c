"""The driver's calls in their order, with a driver whose GPU is host memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from kvtransfer import cuda_memory
from kvtransfer.block_memory import DeviceBytes
from kvtransfer.cuda_memory import CudaDriver, CudaError, CudaMapping, CudaPool
from tests.kvtransfer.device_memory import at
from wire.errors import ConfigError

STEP = 1 << 16
READ, READ_WRITE = 1, 3


def value(argument: Any) -> int:
    return int(getattr(argument, "value", argument))


def put(pointer: Any, number: int) -> None:
    """Into what `byref` was made of."""
    pointer._obj.value = number


class Function:
    """One entry of the library: ctypes lets its signature be set."""

    argtypes: tuple[Any, ...] = ()

    def __init__(self, call: Callable[..., int | None]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        return self._call(*arguments) or 0


class FakeCuda:
    """libcuda as far as it is called. Everything that is made is counted until it is let go of.

    Args:
        fails: this call fails, and with which code.
        read_only: mappings can be.
    """

    def __init__(self, fails: str = "", code: int = 1, *, read_only: bool = True) -> None:
        self.open: Counter[str] = Counter()
        self.rights: list[tuple[int, int]] = []  # device and right of each mapping
        self._fails, self._code, self._read_only = fails, code, read_only
        self._numbers = count(1000)
        self._memory: dict[int, int] = {}  # descriptor by handle
        self._room: dict[int, tuple[int, mmap.mmap | None]] = {}  # by address

    def __getattr__(self, name: str) -> Function:
        if name.startswith("_"):
            raise AttributeError(name)
        call = getattr(self, "_" + re.sub("([A-Z])", r"_\1", name).lower())
        function = Function(self._failing if name == self._fails else call)
        setattr(self, name, function)
        return function

    def _failing(self, *arguments: Any) -> int:
        return self._code

    def _cu_init(self, flags: int) -> None:
        pass

    def _cu_get_error_string(self, code: int, text: Any) -> None:
        text._obj.value = b"the fake says no"

    def _cu_mem_get_allocation_granularity(self, step: Any, wanted: Any, kind: int) -> None:
        assert (wanted._obj.type, wanted._obj.handle_types, wanted._obj.location.type) == (1, 1, 1)
        put(step, STEP)

    def _cu_mem_create(self, handle: Any, size: int, wanted: Any, flags: int) -> None:
        assert size % STEP == 0
        self._give(handle, os.memfd_create("fake"))
        os.ftruncate(self._memory[handle._obj.value], size)

    def _give(self, handle: Any, descriptor: int) -> None:
        put(handle, next(self._numbers))
        self._memory[handle._obj.value] = descriptor
        self.open["handle"] += 1

    def _cu_mem_release(self, handle: Any) -> None:
        os.close(self._memory.pop(value(handle)))
        self.open["handle"] -= 1

    def _cu_mem_address_reserve(self, address: Any, size: int, *rest: int) -> None:
        room = mmap.mmap(-1, size)
        put(address, int(np.frombuffer(room, np.uint8).ctypes.data))
        self._room[address._obj.value] = (size, room)
        self.open["address"] += 1

    def _cu_mem_map(self, address: Any, size: int, offset: int, handle: Any, flags: int) -> int:
        descriptor = self._memory[value(handle)]
        if os.fstat(descriptor).st_size < size:
            return 1
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        fixed = mmap.MAP_SHARED | 0x10
        start = ctypes.c_void_p(value(address))
        found = libc.mmap(start, ctypes.c_size_t(size), 3, fixed, descriptor, ctypes.c_long(0))
        assert found == value(address)
        self.open["mapping"] += 1
        return 0

    def _cu_mem_set_access(self, address: Any, size: int, access: Any, number: int) -> int:
        right = access._obj.flags
        if right == READ and not self._read_only:
            return 801
        self.rights.append((access._obj.location.id, right))
        return 0

    def _cu_mem_export_to_shareable_handle(
        self, out: Any, handle: Any, kind: int, flags: int
    ) -> None:
        assert kind == 1
        put(out, os.dup(self._memory[value(handle)]))

    def _cu_mem_import_from_shareable_handle(self, handle: Any, found: Any, kind: int) -> None:
        assert kind == 1
        self._give(handle, os.dup(value(found)))

    def _cu_mem_unmap(self, address: Any, size: int) -> None:
        self.open["mapping"] -= 1

    def _cu_mem_address_free(self, address: Any, size: int) -> None:
        del self._room[value(address)]
        self.open["address"] -= 1


def held(fake: FakeCuda) -> dict[str, int]:
    return {name: number for name, number in fake.open.items() if number}


def test_what_the_owner_writes_the_reader_reads() -> None:
    fake = FakeCuda()
    calls = CudaDriver(fake)
    pool = CudaPool(2, STEP + 1, calls)
    assert len(pool) == 2 * STEP
    assert pool.address
    assert not os.get_inheritable(pool.descriptor)
    assert held(fake) == {"address": 1, "mapping": 1}, "the mapping keeps the memory"
    mapping = CudaMapping(pool.descriptor, len(pool), device=3, calls=calls)
    assert fake.rights == [(2, READ_WRITE), (3, READ)]
    at(DeviceBytes(pool.address + 4096, 5))[:] = b"block"
    assert bytes(at(mapping.part(4096, 5))) == b"block"
    descriptor = pool.descriptor
    pool.close()
    pool.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    assert bytes(at(mapping.part(4096, 5))) == b"block", "who has it keeps it"
    mapping.close()
    mapping.close()
    assert held(fake) == {"address": 1, "mapping": 1}, "the owner's own"


def test_where_a_part_lies() -> None:
    pool = CudaPool(0, STEP, CudaDriver(FakeCuda()))
    assert pool.offset_of(DeviceBytes(pool.address + 512, 256)) == 512
    assert pool.offset_of(DeviceBytes(pool.address + STEP - 255, 256)) is None
    assert pool.offset_of(DeviceBytes(pool.address - 16, 256)) is None
    assert pool.offset_of(memoryview(bytearray(16))) is None
    pool.close()


OWNERS = [
    *("cuMemGetAllocationGranularity", "cuMemCreate", "cuMemAddressReserve"),
    *("cuMemMap", "cuMemSetAccess", "cuMemExportToShareableHandle"),
]


@pytest.mark.parametrize("name", OWNERS)
def test_an_owner_without_such_memory_keeps_nothing(name: str) -> None:
    fake = FakeCuda(name)
    with pytest.raises(ConfigError, match=rf"{name}: the fake says no.*--transport shm,zmq"):
        CudaPool(0, STEP, CudaDriver(fake))
    assert held(fake) == {}


READERS = [
    *("cuMemImportFromShareableHandle", "cuMemAddressReserve", "cuMemMap", "cuMemSetAccess"),
]


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_cannot_map_it_keeps_nothing(name: str) -> None:
    pool = CudaPool(0, STEP, CudaDriver(FakeCuda()))
    fake = FakeCuda(name)
    with pytest.raises(CudaError, match=f"{name}: the fake says no"):
        CudaMapping(pool.descriptor, STEP, device=0, calls=CudaDriver(fake))
    assert held(fake) == {}
    pool.close()


def test_a_pool_that_is_smaller_than_it_says_is_refused() -> None:
    pool = CudaPool(0, STEP, CudaDriver(FakeCuda()))
    fake = FakeCuda()
    with pytest.raises(CudaError, match="cuMemMap"):
        CudaMapping(pool.descriptor, 2 * STEP, device=0, calls=CudaDriver(fake))
    assert held(fake) == {}
    pool.close()


def test_a_driver_without_read_only_mappings() -> None:
    pool = CudaPool(0, STEP, CudaDriver(FakeCuda()))
    fake = FakeCuda(read_only=False)
    mapping = CudaMapping(pool.descriptor, STEP, device=1, calls=CudaDriver(fake))
    assert fake.rights == [(1, READ_WRITE)]
    assert held(fake) == {"address": 1, "mapping": 1}
    mapping.close()
    assert held(fake) == {}
    pool.close()


def test_without_a_driver_it_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_memory.driver.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", no_library)
    with pytest.raises(ConfigError, match="no usable CUDA driver: no libcuda"):
        CudaPool(0, STEP)
    cuda_memory.driver.cache_clear()


def no_library(name: str) -> object:
    raise OSError("no libcuda")
