"""Numbers survive the wire as well as its type allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvtransfer.numbers import STORES, Numbers, decode, encode
from wire.geometry import SCALED_DTYPES, Geometry
from wire.layout import KVLayout

floats = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=5, max_dims=5, max_side=3),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)
WORST = {"int8": 0.5 / 127, "fp8": 1 / 16}
"""The largest error, as a part of the largest number of the vector (int8) or of each (fp8)."""


@given(floats, st.sampled_from(sorted(STORES)), st.sampled_from(sorted(STORES)))
def test_a_cast_is_one_cast(numbers: Numbers, wire: str, stored: str) -> None:
    data = encode(numbers, wire)
    assert len(data) == numbers.size * STORES[wire].itemsize
    expected = numbers.astype(STORES[wire]).astype(STORES[stored])
    assert np.array_equal(decode(data, numbers.shape, wire, stored), expected)


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
@given(numbers=floats)
def test_a_scaled_vector_errs_little(numbers: Numbers, dtype: str) -> None:
    data = encode(numbers, dtype)
    layout = KVLayout(1, 1, numbers.shape[-1], 1, "float32")
    vectors = numbers.size // numbers.shape[-1]
    assert len(data) == vectors * Geometry(dtype=dtype).vector_bytes(layout)
    back = decode(data, numbers.shape, dtype, "float32")
    peak = np.abs(numbers).max(axis=-1, keepdims=True)
    error = np.abs(back - numbers)
    assert (error <= WORST[dtype] * peak * 1.001).all()


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
def test_zeros_stay_zeros_and_an_outlier_costs_its_own_vector_only(dtype: str) -> None:
    numbers = np.zeros((1, 1, 3, 1, 4), np.float32)
    numbers[0, 0, 1] = [1e4, 1, 2, 3]
    numbers[0, 0, 2] = [1, 2, 4, 8]
    back = decode(encode(numbers, dtype), numbers.shape, dtype, "float32")
    assert not back[0, 0, 0].any()
    assert back[0, 0, 1, 0, 0] == pytest.approx(1e4)
    assert back[0, 0, 2, 0] == pytest.approx([1, 2, 4, 8], rel=0.05)


def test_what_a_type_cannot_hold_is_infinite() -> None:
    numbers = np.full((1, 1, 1, 1, 2), 1e6, np.float32)
    assert np.isinf(decode(encode(numbers, "float16"), numbers.shape, "float16", "float32")).all()


def test_equal_types_need_no_copy() -> None:
    numbers = np.zeros((1, 1, 1, 1, 2), np.float32)
    assert np.shares_memory(np.asarray(encode(numbers, "float32")), numbers)
