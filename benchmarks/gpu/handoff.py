"""What a handoff between two devices' pools takes of the devices, without sockets and leases.

    staging     gather, digest, to pinned memory │ from it, digest, scatter      one after the other
    cuda-ipc    gather, digest                   │ read the mapped pool, digest, scatter

Both on one device, in one process: what two processes do at the same time is done in turns here.
The copies are those of a node (`engine.unit_copies`), each waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from engine.device import synchronize, tensor_at
from engine.kv_store import KVStore
from engine.staging import Staging
from engine.unit_copies import Address, Copied, Cut, UnitCopies
from kernels.block_copy import Part
from kvtransfer.cuda_memory import CudaMapping, CudaPool
from kvtransfer.device_pool import HostDeviceMapping, HostDevicePool
from wire.layout import KVLayout

LAYER_GROUPS = 4  # as a grant cuts large blocks (wire.geometry)


class Handoff:
    """Blocks of one layer group, from one pool to another one on the same device."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._layout = layout
        self._layers = max(1, layout.num_layers // LAYER_GROUPS)
        over = partial(_wait_and_tell, device)
        size = num_blocks * layout.block_bytes
        self._pool = CudaPool(device.index or 0, size) if on_gpu else HostDevicePool(size)
        memory = (
            tensor_at(self._pool.address, size, device)
            if isinstance(self._pool, CudaPool)
            else self._pool.buffer
        )
        source = KVStore(layout, num_blocks, device, memory)
        source.blocks.zero_()
        self._target = KVStore(layout, num_blocks, device)
        staging = Staging(max(256 << 20, size), pinned=on_gpu)
        self._out = UnitCopies(source, staging, when_over=over)
        self._in = UnitCopies(self._target, staging, when_over=over)
        mapped: Callable[[int, int], CudaMapping | HostDeviceMapping] = HostDeviceMapping
        if on_gpu:
            mapped = partial(CudaMapping, device=device.index or 0)
        self._mapping = mapped(self._pool.descriptor, len(self._pool))
        order = np.random.default_rng(1).permutation(num_blocks)
        slots = order[:, None] * layout.block_size + np.arange(layout.block_size)
        part = Part(0, self._layers, 0, layout.num_kv_heads)
        self._order, self._cut = order, Cut(part, slots, source.blocks.dtype)

    @property
    def num_bytes(self) -> int:
        """That are handed over, once."""
        return len(self._cut) * self._unit_bytes

    @property
    def _unit_bytes(self) -> int:
        return self._layout.block_bytes // self._layout.num_layers * self._layers

    def by_staging(self) -> None:
        units: list[Copied] = []
        self._out.read(self._cut, lambda _, some: units.extend(some), seed=1, payload=True)
        sources = [unit.payload for unit in units if unit.payload is not None]
        self._in.write(self._cut, sources, _nothing, seed=1)

    def by_cuda_ipc(self) -> None:
        self._out.read(self._cut, _nothing, seed=1, payload=False)
        sources: list[memoryview | Address] = []
        for block in self._order.tolist():
            part = self._mapping.part(block * self._layout.block_bytes, self._unit_bytes)
            sources.append(Address(part.address, part.nbytes))
        self._in.write(self._cut, sources, _nothing, seed=1)

    def close(self) -> None:
        """Let go of the mapping; the pool is the process's."""
        self._mapping.close()
        self._pool.close()


def _wait_and_tell(device: torch.device, tell: Callable[[], None]) -> None:
    synchronize(device)
    tell()


def _nothing(*told: object) -> None:
    """Nobody asks."""
