"""What only a GPU can show of `cuda-ipc`: memory that others map, and that outlives its owner."""

from __future__ import annotations

import array
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.device import tensor_at
from engine.kv_store import KVStore
from engine.staging import Staging
from engine.unit_copies import Address, Cut, UnitCopies
from kernels.block_copy import Part
from kvtransfer.cuda_memory import CudaError, CudaMapping, CudaPool
from kvtransfer.digest import content_of
from wire.layout import KVLayout

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of other versions of torch and triton
]
LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16")
NUM_BLOCKS = 16
SEED = 5
ROOT = Path(__file__).parents[2]


def at_the_end(tell: Callable[[], None]) -> None:
    torch.cuda.current_stream().synchronize()
    tell()


def fill(pool: CudaPool) -> torch.Tensor:
    """The blocks of a pool, full of noise that every process makes alike."""
    size = NUM_BLOCKS * LAYOUT.block_bytes
    memory = tensor_at(pool.address, len(pool), "cuda:0")
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 100, (size,), dtype=torch.uint8, generator=generator)
    memory[:size].copy_(noise)
    torch.cuda.synchronize()
    return KVStore(LAYOUT, NUM_BLOCKS, "cuda:0", memory).blocks


def copied(mapping: CudaMapping) -> tuple[torch.Tensor, list[bytes | None]]:
    """All blocks of a mapped pool, in reverse, and their digests."""
    store = KVStore(LAYOUT, NUM_BLOCKS, "cuda:0")
    copies = UnitCopies(store, Staging(1 << 20, pinned=True), when_over=at_the_end)
    slots = np.arange(NUM_BLOCKS * 16).reshape(NUM_BLOCKS, 16)[::-1].copy()
    cut = Cut(Part(0, 4, 0, 2), slots, torch.bfloat16)
    parts = [
        mapping.part(block * LAYOUT.block_bytes, LAYOUT.block_bytes) for block in range(NUM_BLOCKS)
    ]
    contents: list[bytes | None] = []
    sources = [Address(part.address, part.nbytes) for part in parts]
    copies.write(cut, sources, lambda _, found: contents.extend(found), seed=SEED)
    return store.blocks.flip(0), contents


def test_a_pool_is_read_by_who_maps_it() -> None:
    pool = CudaPool(0, NUM_BLOCKS * LAYOUT.block_bytes)
    blocks = fill(pool)
    mapping = CudaMapping(pool.descriptor, len(pool), device=0)
    found, contents = copied(mapping)
    assert torch.equal(found, blocks)
    assert contents == [
        content_of(block.view(torch.uint8).flatten().cpu().numpy().tobytes(), SEED)
        for block in blocks
    ]
    mapping.close()
    pool.close()


def test_more_than_there_is_cannot_be_mapped() -> None:
    pool = CudaPool(0, NUM_BLOCKS * LAYOUT.block_bytes)
    with pytest.raises(CudaError):
        CudaMapping(pool.descriptor, 2 * len(pool), device=0)
    pool.close()


def test_a_killed_owner_takes_nothing_from_under_its_reader() -> None:
    expected = fill(CudaPool(0, NUM_BLOCKS * LAYOUT.block_bytes))
    here, there = socket.socketpair()
    with here, there:
        owner = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(there.fileno())],
            pass_fds=[there.fileno()],
            env=os.environ
            | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        )
        try:
            here.settimeout(60)
            data, (rights,), _, _ = here.recvmsg(8, socket.CMSG_SPACE(4))
            descriptor = array.array("i", rights[2])[0]
            mapping = CudaMapping(descriptor, int.from_bytes(data, "little"), device=0)
            os.close(descriptor)
            assert torch.equal(copied(mapping)[0], expected)
            owner.send_signal(signal.SIGKILL)
            assert owner.wait(30) == -signal.SIGKILL
            assert torch.equal(copied(mapping)[0], expected), "its memory lives on"
            mapping.close()
        finally:
            owner.kill()
            owner.wait(30)
    torch.cuda.synchronize()


def own(connection: socket.socket) -> None:
    """The other process: give the pool away, and wait to be killed."""
    torch.cuda.set_device(0)
    pool = CudaPool(0, NUM_BLOCKS * LAYOUT.block_bytes)
    fill(pool)
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [pool.descriptor]))
    connection.sendmsg([len(pool).to_bytes(8, "little")], [rights])
    signal.pause()


if __name__ == "__main__":
    own(socket.socket(fileno=int(sys.argv[1])))
