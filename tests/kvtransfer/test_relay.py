"""The bytes of units survive gather and scatter, and touch nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.relay import gather, scatter
from kvtransfer.units import unit_bytes, units_of
from tests.kvtransfer.pool import filled
from wire.geometry import Geometry
from wire.layout import DTYPE_BYTES, KVLayout

small = st.integers(1, 5)
layouts = st.builds(KVLayout, small, small, small, small, st.sampled_from(sorted(DTYPE_BYTES)))


def random_block(layout: KVLayout, seed: int) -> memoryview:
    return np.random.default_rng(seed).integers(0, 256, layout.block_bytes, dtype=np.uint8).data


@given(layouts, st.integers(0, 1 << 32), st.data())
def test_gather_then_scatter_restores_the_filled_slots_only(
    layout: KVLayout, seed: int, draw: st.DataObject
) -> None:
    num_tokens = draw.draw(st.integers(1, layout.block_size))
    geometry = Geometry(draw.draw(st.integers(1, layout.num_layers)))
    source, target = random_block(layout, seed), random_block(layout, seed + 1)
    expected = np.asarray(target).copy().reshape(layout.num_layers * 2, layout.block_size, -1)
    expected[:, :num_tokens] = np.asarray(source).reshape(expected.shape)[:, :num_tokens]
    for unit in units_of(num_tokens, 0, layout, geometry):
        data = gather(unit, source, layout)
        assert len(data) == unit_bytes(unit, layout)
        scatter(unit, data, target, layout)
    assert filled(target, layout.block_size, layout) == expected.tobytes()


def test_the_wire_order_is_layer_kv_token_head_dim() -> None:
    """Spelled out once, independently of the code under test."""
    layout = KVLayout(num_layers=4, num_kv_heads=3, head_dim=4, block_size=5, dtype="float16")
    values = np.arange(4 * 2 * 5 * 3 * 4, dtype=np.float16).reshape(4, 2, 5, 3, 4)
    block = values.copy().view(np.uint8).reshape(-1).data
    _, unit = units_of(3, 0, layout, Geometry(2))
    sent = np.frombuffer(gather(unit, block, layout), np.float16).reshape(2, 2, 3, 3, 4)
    assert np.array_equal(sent, values[2:, :, :3])


def test_a_layer_group_of_a_full_block_travels_without_a_copy() -> None:
    layout = KVLayout(4, 1, 4, 4, "float32")
    block = random_block(layout, 0)
    for number, unit in enumerate(units_of(4, 0, layout, Geometry(2))):
        sent = np.asarray(gather(unit, block, layout))
        half = np.asarray(block)[number * len(sent) : (number + 1) * len(sent)]
        assert np.shares_memory(sent, half)
        assert np.array_equal(sent, half)
