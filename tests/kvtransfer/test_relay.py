"""What one layout holds arrives in another one: every number in its slot, and nothing elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.relay import blocks_of, gather, layers_of, scatter
from kvtransfer.units import Unit, unit_bytes, units_of
from tests.kvtransfer.stores import blocks_with, computed, read_back
from wire.geometry import Geometry, geometry_for, head_groups
from wire.layout import DTYPE_BYTES, KVLayout

small = st.integers(1, 4)
dtypes = st.sampled_from(sorted(DTYPE_BYTES))


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[KVLayout, KVLayout]:
    """A rank of a prefill node and one of a decode node, all heads of one model between them."""
    layers, dim, heads = draw(small), draw(small), draw(small)
    tp = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (1, 3), (6, 2)]))
    total = heads * max(tp)
    sides = [
        KVLayout(
            layers,
            total // size,
            dim,
            draw(st.integers(1, 6)),
            draw(dtypes),
            draw(st.integers(0, size - 1)),
            size,
        )
        for size in tp
    ]
    return sides[0], sides[1]


def send(unit: Unit, source: list[bytearray], layout: KVLayout, dtype: str) -> memoryview:
    part = layers_of(unit, layout)
    layers = [memoryview(source[i])[part] for i in blocks_of(unit, layout)]
    return gather(unit, layers, layout, dtype)


@given(two_layouts(), st.integers(1, 20), st.integers(0, 3), st.integers(1, 4), st.data())
def test_all_ranks_together_fill_exactly_what_is_missing(
    layouts: tuple[KVLayout, KVLayout],
    num_tokens: int,
    cached_blocks: int,
    layer_groups: int,
    draw: st.DataObject,
) -> None:
    prefill, decode = layouts
    assert prefill.can_exchange(decode)
    cached = min(cached_blocks, num_tokens // decode.block_size) * decode.block_size
    groups = min(layer_groups, prefill.num_layers)
    geometry = Geometry(groups, head_groups(prefill, decode), draw.draw(dtypes))
    model = computed(decode, num_tokens, seed=1)
    target = blocks_with(np.full_like(model, 77.0), decode)
    ranks = [replace(prefill, tp_rank=rank) for rank in range(prefill.tp_size)]
    for unit in units_of(num_tokens, cached, decode, geometry):
        (holder,) = [
            rank
            for rank in ranks
            if rank.head_range[0] <= unit.head_start and unit.head_end <= rank.head_range[1]
        ]
        dtype = geometry.dtype_for(decode)
        data = send(unit, blocks_with(model, holder), holder, dtype)
        assert len(data) == unit_bytes(unit, decode, geometry)
        block = memoryview(target[unit.block])
        scatter(unit, data, block, decode, dtype)
    expected = read_back(blocks_with(model, decode), decode)
    expected[:, :, :cached] = 77.0
    assert np.array_equal(read_back(target, decode), expected)


def test_the_wire_order_is_layer_kv_token_head_dim() -> None:
    """Spelled out once, independently of the code under test."""
    layout = KVLayout(num_layers=4, num_kv_heads=3, head_dim=4, block_size=5, dtype="float16")
    values = np.arange(4 * 2 * 5 * 3 * 4, dtype=np.float16).reshape(4, 2, 5, 3, 4)
    block = values.copy().view(np.uint8).reshape(-1).data
    _, unit = units_of(3, 0, layout, Geometry(2))
    sent = gather(unit, [block[layers_of(unit, layout)]], layout, "float16")
    assert np.array_equal(np.frombuffer(sent, np.float16).reshape(2, 2, 3, 3, 4), values[2:, :, :3])


def test_a_layer_group_of_a_full_block_travels_without_a_copy() -> None:
    layout = KVLayout(4, 1, 4, 4, "float32")
    (block,) = blocks_with(computed(layout, 4, seed=1), layout)
    for number, unit in enumerate(units_of(4, 0, layout, Geometry(2))):
        sent = np.asarray(send(unit, [block], layout, "float32"))
        half = np.asarray(block)[number * len(sent) : (number + 1) * len(sent)]
        assert np.shares_memory(sent, half)
        assert np.array_equal(sent, half)


def test_types_meet_in_the_narrower_one() -> None:
    wide, narrow = (KVLayout(1, 1, 4, 4, dtype) for dtype in ("float32", "bfloat16"))
    for prefill, decode in [(wide, narrow), (narrow, wide)]:
        assert geometry_for(decode, prefill).dtype_for(decode) == "bfloat16"
    half = replace(narrow, dtype="float16")
    assert geometry_for(half, narrow).dtype_for(half) == "float16", "the receiver's, on a tie"
    assert geometry_for(wide, wide) == geometry_for(wide)


def test_what_cannot_be_exchanged() -> None:
    layout = KVLayout(4, 6, 8, 16, "float32")
    for other in (
        replace(layout, num_layers=3),
        replace(layout, num_kv_heads=5),
        replace(layout, head_dim=16),
        replace(layout, num_kv_heads=3),
    ):
        assert not layout.can_exchange(other)
        assert not other.can_exchange(layout)
    halves, thirds = (replace(layout, num_kv_heads=6 // n, tp_size=n) for n in (2, 3))
    assert layout.can_exchange(halves)
    assert layout.can_exchange(replace(thirds, block_size=32, dtype="float16"))
    assert not halves.can_exchange(thirds), "neither is a multiple of the other"
