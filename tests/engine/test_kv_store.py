"""The KV store: slots land where the layout says, and a block's bytes are its own memory."""

from __future__ import annotations

import pytest
import torch

from engine.kv_store import KVStore
from wire.layout import KVLayout


def make_store(dtype: str = "float32") -> KVStore:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=8, dtype=dtype)
    store = KVStore(layout, num_blocks=5)
    store.blocks.zero_()
    return store


def test_rows_land_in_their_slots_of_their_layer() -> None:
    store = make_store()
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    blocks, offsets = torch.tensor([4, 4, 1]), torch.tensor([6, 7, 0])
    store.write(1, (blocks, offsets), k, v)
    assert torch.equal(store.blocks[4, 1, 0, 6:], k[:2])
    assert torch.equal(store.blocks[4, 1, 1, 6:], v[:2])
    assert torch.equal(store.blocks[1, 1, :, 0], torch.stack([k[2], v[2]]))
    assert int(store.blocks.count_nonzero()) == 2 * 3 * 2 * 4


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_block_bytes_are_the_blocks_memory(dtype: str) -> None:
    store = make_store(dtype)
    view = store.block_bytes(3)
    assert view.nbytes == len(view) == store.layout.block_bytes
    assert not view.readonly
    assert view.contiguous
    view[:] = bytes(i % 64 for i in range(len(view)))
    expected = torch.frombuffer(bytearray(view), dtype=getattr(torch, dtype))
    assert torch.equal(store.blocks[3].flatten(), expected)
    assert not store.blocks[[0, 1, 2, 4]].any()
    store.blocks[3] = 0
    assert not any(view)


@pytest.mark.parametrize("block_id", [-1, 5])
def test_a_block_that_does_not_exist(block_id: int) -> None:
    with pytest.raises(IndexError):
        make_store().block_bytes(block_id)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_store_in_given_memory(dtype: str) -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=8, dtype=dtype)
    memory = bytearray(5 * layout.block_bytes + 100)
    store = KVStore(layout, 5, buffer=memory)
    assert store.blocks.shape == (5, 3, 2, 8, 2, 4)
    assert not store.blocks.any()
    store.blocks[2] = 1
    start = 2 * layout.block_bytes
    assert memory[start : start + layout.block_bytes] == bytes(store.block_bytes(2))
    assert not any(memory[:start])
    assert not any(memory[start + layout.block_bytes :])


def test_memory_that_is_too_small_for_a_store() -> None:
    layout = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=8, dtype="float32")
    with pytest.raises(ValueError, match="buffer"):
        KVStore(layout, 5, buffer=bytearray(5 * layout.block_bytes - 1))
