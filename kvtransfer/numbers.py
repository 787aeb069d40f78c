"""The numbers of a unit on the wire: casts between the types of stores, or 8 bits with a scale.

    cast     [layer, K/V, token, head, dim] in the wire's type
    scaled   [layer, K/V, token, head] float32 scales, then [layer, K/V, token, head, dim] bytes

A vector (one head's key or value of one token) is its bytes times its scale. The scale maps the
largest of its numbers to the largest of the type, so that one outlier costs its own vector only.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from wire.geometry import SCALE_BYTES

Numbers: TypeAlias = npt.NDArray[Any]
"""[layer, K/V, token, head, dim]"""

STORES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_SCALED: dict[str, np.dtype[Any]] = {
    "int8": np.dtype(np.int8),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


def encode(numbers: Numbers, dtype: str) -> memoryview:
    """The bytes of `numbers` as the wire's type `dtype`; a copy where anything has to change."""
    if dtype in _SCALED:
        return _encode_scaled(numbers.astype(np.float32), dtype)
    return _flat(_cast(numbers, STORES[dtype]))


def decode(data: memoryview, shape: tuple[int, ...], dtype: str, stored: str) -> Numbers:
    """What `encode` made, as numbers of a store's type."""
    if dtype in _SCALED:
        return _cast(_decode_scaled(data, shape, dtype), STORES[stored])
    return _cast(np.frombuffer(data, STORES[dtype]).reshape(shape), STORES[stored])


def _cast(numbers: Numbers, dtype: np.dtype[Any]) -> Numbers:
    with np.errstate(over="ignore"):  # what the type cannot hold is infinite there, too
        return numbers.astype(dtype, copy=False)


def _encode_scaled(numbers: Numbers, dtype: str) -> memoryview:
    peak = np.abs(numbers).max(axis=-1, keepdims=True)
    scales = np.where(peak > 0, peak / np.float32(_LARGEST[dtype]), np.float32(1))
    scaled = numbers / scales
    small = np.rint(scaled) if dtype == "int8" else scaled
    data = np.concatenate([_bytes(scales), _bytes(small.astype(_SCALED[dtype]))])
    return data.data


def _decode_scaled(data: memoryview, shape: tuple[int, ...], dtype: str) -> Numbers:
    end = int(np.prod(shape[:-1])) * SCALE_BYTES
    scales = np.frombuffer(data[:end], np.float32).reshape(*shape[:-1], 1)
    small = np.frombuffer(data[end:], _SCALED[dtype]).reshape(shape)
    return small.astype(np.float32) * scales


def _flat(numbers: Numbers) -> memoryview:
    return _bytes(numbers).data


def _bytes(numbers: Numbers) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(-1)
