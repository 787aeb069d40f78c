"""Units cover exactly what is missing: each token of each layer and head once."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.units import Unit, unit_bytes, units_of
from wire.geometry import MAX_LAYER_GROUPS, MIN_UNIT_BYTES, Geometry, geometry_for
from wire.layout import DTYPE_BYTES, KVLayout

small = st.integers(1, 5)
layouts = st.builds(
    KVLayout,
    small,
    small,
    small,
    small,
    st.sampled_from(sorted(DTYPE_BYTES)),
    tp_rank=st.integers(0, 2),
    tp_size=st.just(3),
)


@st.composite
def cut_layouts(draw: st.DrawFn) -> tuple[KVLayout, Geometry]:
    layout = draw(layouts)
    layers = draw(st.integers(1, layout.num_layers))
    return layout, Geometry(layers, draw(st.integers(1, layout.num_kv_heads)))


@given(cut_layouts(), st.integers(0, 30), st.integers(0, 6))
def test_units_cover_each_missing_cell_once(
    cut: tuple[KVLayout, Geometry], num_tokens: int, cached_blocks: int
) -> None:
    layout, geometry = cut
    cached = cached_blocks * layout.block_size
    units = units_of(num_tokens, cached, layout, geometry)
    covered = Counter(cell for unit in units for cell in cells(unit))
    missing = product(
        range(cached, num_tokens), range(layout.num_layers), range(*layout.head_range)
    )
    assert covered == Counter(missing)
    for unit in units:
        assert unit.token_start == unit.block * layout.block_size
        assert 0 < unit.num_tokens <= layout.block_size
    assert sum(unit_bytes(unit, layout) for unit in units) == layout.bytes_per_token * max(
        0, num_tokens - cached
    )


@given(cut_layouts(), st.integers(1, 30), st.integers(0, 6))
def test_a_unit_has_the_same_number_whatever_is_cached(
    cut: tuple[KVLayout, Geometry], num_tokens: int, cached_blocks: int
) -> None:
    layout, geometry = cut
    everything = units_of(num_tokens, 0, layout, geometry)
    assert [unit.index for unit in everything] == list(range(len(everything)))
    missing = units_of(num_tokens, cached_blocks * layout.block_size, layout, geometry)
    assert missing == everything[len(everything) - len(missing) :]


def test_the_list_is_spelled_out_once() -> None:
    layout = KVLayout(4, 2, 8, 4, "float16", tp_rank=1, tp_size=2)
    assert units_of(6, 0, layout, Geometry(2, 2)) == (
        Unit(0, 0, 0, 4, 0, 2, 2, 3),
        Unit(1, 0, 0, 4, 0, 2, 3, 4),
        Unit(2, 0, 0, 4, 2, 4, 2, 3),
        Unit(3, 0, 0, 4, 2, 4, 3, 4),
        Unit(4, 1, 4, 6, 0, 2, 2, 3),
        Unit(5, 1, 4, 6, 0, 2, 3, 4),
        Unit(6, 1, 4, 6, 2, 4, 2, 3),
        Unit(7, 1, 4, 6, 2, 4, 3, 4),
    )


def test_all_cached_leaves_nothing_to_send() -> None:
    layout = KVLayout(1, 1, 1, 4, "float32")
    assert units_of(8, 8, layout) == ()
    assert units_of(9, 8, layout) == (Unit(2, 2, 8, 9, 0, 1, 0, 1),)
    with pytest.raises(AssertionError):
        units_of(9, 7, layout)


@given(
    st.integers(1, 100),
    st.integers(1, 64),
    st.sampled_from([64, 128]),
    st.sampled_from([8, 16, 64]),
    st.sampled_from(sorted(DTYPE_BYTES)),
)
def test_layer_groups_are_few_and_not_small(
    num_layers: int, num_heads: int, head_dim: int, block_size: int, dtype: str
) -> None:
    layout = KVLayout(num_layers, num_heads, head_dim, block_size, dtype)
    groups = geometry_for(layout).num_layer_groups
    assert 1 <= groups <= min(num_layers, MAX_LAYER_GROUPS)
    assert groups == 1 or layout.block_bytes // groups >= MIN_UNIT_BYTES


def cells(unit: Unit) -> product[tuple[int, ...]]:
    return product(
        range(unit.token_start, unit.token_end),
        range(unit.layer_start, unit.layer_end),
        range(unit.head_start, unit.head_end),
    )
