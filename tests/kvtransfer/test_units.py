"""Units cover exactly the missing tokens, and their bytes survive gather and scatter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.units import Unit, gather, scatter, unit_bytes, units_of
from wire.layout import DTYPE_BYTES, KVLayout

small = st.integers(1, 5)
layouts = st.builds(KVLayout, small, small, small, small, st.sampled_from(sorted(DTYPE_BYTES)))


def random_block(layout: KVLayout, seed: int) -> memoryview:
    return np.random.default_rng(seed).integers(0, 256, layout.block_bytes, dtype=np.uint8).data


@given(layouts, st.integers(0, 60), st.integers(0, 12))
def test_units_cover_each_missing_token_once(
    layout: KVLayout, num_tokens: int, cached_blocks: int
) -> None:
    cached = cached_blocks * layout.block_size
    units = units_of(num_tokens, cached, layout)
    covered = [token for unit in units for token in range(unit.token_start, unit.token_end)]
    assert covered == list(range(cached, num_tokens))
    for unit in units:
        assert unit.token_start == unit.index * layout.block_size
        assert 0 < unit.num_tokens <= layout.block_size
        assert unit.num_tokens == layout.block_size or unit is units[-1]


def test_all_cached_leaves_nothing_to_send() -> None:
    layout = KVLayout(1, 1, 1, 4, "float32")
    assert units_of(8, 8, layout) == ()
    assert units_of(9, 8, layout) == (Unit(2, 8, 9),)
    with pytest.raises(AssertionError):
        units_of(9, 7, layout)


@given(layouts, st.integers(0, 1 << 32), st.data())
def test_gather_then_scatter_restores_the_filled_slots_only(
    layout: KVLayout, seed: int, draw: st.DataObject
) -> None:
    num_tokens = draw.draw(st.integers(1, layout.block_size))
    source, target = random_block(layout, seed), random_block(layout, seed + 1)
    before = slots(target, layout).copy()
    unit = gather(source, num_tokens, layout)
    assert len(unit) == unit_bytes(num_tokens, layout)
    scatter(unit, target, num_tokens, layout)
    after = slots(target, layout)
    assert np.array_equal(after[:, :num_tokens], slots(source, layout)[:, :num_tokens])
    assert np.array_equal(after[:, num_tokens:], before[:, num_tokens:])


@given(layouts, st.integers(0, 1 << 32), st.data())
def test_scatter_then_gather_gives_the_unit_back(
    layout: KVLayout, seed: int, draw: st.DataObject
) -> None:
    num_tokens = draw.draw(st.integers(1, layout.block_size))
    unit = random_block(layout, seed)[: unit_bytes(num_tokens, layout)]
    block = random_block(layout, seed + 1)
    scatter(unit, block, num_tokens, layout)
    assert gather(block, num_tokens, layout) == unit


def test_the_wire_order_is_layer_kv_token_head_dim() -> None:
    """Spelled out once, independently of the code under test."""
    layout = KVLayout(num_layers=2, num_kv_heads=3, head_dim=4, block_size=5, dtype="float16")
    values = np.arange(2 * 2 * 5 * 3 * 4, dtype=np.float16).reshape(2, 2, 5, 3, 4)
    block = values.copy().view(np.uint8).reshape(-1).data
    unit = np.frombuffer(gather(block, 3, layout), np.float16).reshape(2, 2, 3, 3, 4)
    assert np.array_equal(unit, values[:, :, :3])


def test_a_full_block_travels_without_a_copy() -> None:
    layout = KVLayout(2, 1, 4, 4, "float32")
    block = random_block(layout, 0)
    assert np.shares_memory(np.asarray(gather(block, 4, layout)), np.asarray(block))


def slots(block: memoryview, layout: KVLayout) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(block).reshape(layout.num_layers * 2, layout.block_size, -1)
