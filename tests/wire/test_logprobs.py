"""Packed logprobs: what goes in comes out, and nothing else comes in."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from wire.logprobs import MAX_TOP_LOGPROBS, UNKNOWN, Row, TokenLogprobs, pack, unpack

ROW: TypeAdapter[bytes] = TypeAdapter(Row)
logprobs = st.floats(max_value=0, width=32)


@given(logprobs, st.integers(1, (1 << 32) - 1), st.lists(st.tuples(st.integers(0, 99), logprobs)))
def test_round_trip(logprob: float, rank: int, top: list[tuple[int, float]]) -> None:
    row = TokenLogprobs(logprob, rank, tuple(top))
    assert unpack(pack(row)) == row
    assert ROW.validate_python(pack(row)) == pack(row)


def test_the_unknown_row_is_valid() -> None:
    assert ROW.validate_python(UNKNOWN) == UNKNOWN


@pytest.mark.parametrize(
    "row",
    [
        b"1234567",
        bytes(12),
        struct.pack("<If", 0, -1.0),
        struct.pack("<If", 1, 0.5),
        struct.pack("<If", 1, math.nan),
        struct.pack("<IfIf", 1, -1.0, 5, math.nan),
        struct.pack("<If", 1, -1.0) * (2 + MAX_TOP_LOGPROBS),
        "text",
        [1, -1.0],
    ],
)
def test_what_is_no_row_is_refused(row: object) -> None:
    with pytest.raises(ValidationError):
        ROW.validate_python(row)
