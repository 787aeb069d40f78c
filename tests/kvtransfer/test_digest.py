"""A digest changes with every bit of the bytes and with everything that says what they are."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer import digest
from kvtransfer.digest import DIGEST_BYTES, PIECE_BYTES, UnitSealer
from kvtransfer.units import Unit
from tests.kvtransfer.pool import unit_of
from wire.types import AttemptId

DATA = bytes(range(256)) * 5
UNIT = Unit(2, 2, 8, 11, 4, 8, 2, 3)
TRUTH: dict[str, Any] = {
    "key": b"k" * 16,
    "id": AttemptId("request", 3),
    "lease": 7,
    "tokens": tuple(range(11)),
    "block_size": 4,
    "model_fingerprint": "model",
    "cache_salt": "salt",
}
SEAL = UnitSealer(**TRUTH).digest(UNIT, DATA)


def test_both_sides_agree() -> None:
    assert UnitSealer(**TRUTH).digest(UNIT, memoryview(DATA)) == SEAL
    assert len(SEAL) == DIGEST_BYTES


def test_the_token_type_makes_no_difference() -> None:
    assert UnitSealer(**TRUTH | {"tokens": list(range(11))}).digest(UNIT, DATA) == SEAL


@given(st.integers(0, len(DATA) * 8 - 1))
def test_every_bit_counts(bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << (bit % 8)
    assert UnitSealer(**TRUTH).digest(UNIT, bytes(damaged)) != SEAL


@given(st.integers(0, len(DATA) - 1))
def test_every_length_counts(length: int) -> None:
    assert UnitSealer(**TRUTH).digest(UNIT, DATA[:length]) != SEAL


@pytest.mark.parametrize(
    "other",
    [
        {"key": b"K" + b"k" * 15},
        {"id": AttemptId("request", 4)},
        {"id": AttemptId("request2", 3)},
        {"lease": 8},
        {"model_fingerprint": "model2"},
        {"cache_salt": "salz"},
        {"cache_salt": ""},
        {"tokens": (99, *range(1, 11))},  # far before the unit
        {"tokens": (*range(10), 99)},  # within it
    ],
    ids=str,
)
def test_everything_that_names_the_content_counts(other: dict[str, Any]) -> None:
    assert UnitSealer(**TRUTH | other).digest(UNIT, DATA) != SEAL


@pytest.mark.parametrize(
    "other",
    [
        {"block": 1},
        {"token_start": 7},
        {"token_end": 10},
        {"layer_start": 3},
        {"layer_end": 7},
        {"head_start": 1},
        {"head_end": 4},
    ],
    ids=str,
)
def test_the_place_counts(other: dict[str, int]) -> None:
    assert UnitSealer(**TRUTH).digest(replace(UNIT, **other), DATA) != SEAL


def test_tokens_behind_the_unit_do_not_count() -> None:
    longer = TRUTH | {"tokens": tuple(range(11)) + (1,) * 20}
    first = unit_of(0)
    assert UnitSealer(**longer).digest(first, DATA) == UnitSealer(**TRUTH).digest(first, DATA)


def test_names_cannot_run_into_each_other() -> None:
    """lease | attempt | request: the free text comes last, so no two triples read the same."""
    seals = {
        UnitSealer(**TRUTH | {"lease": lease, "id": AttemptId(request, attempt)}).digest(UNIT, DATA)
        for lease, attempt, request in [(1, 2, "3/r"), (1, 2, "3"), (0x12, 3, "r"), (1, 23, "r")]
    }
    assert len(seals) == 4


@pytest.mark.parametrize("length", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES - 1])
def test_bytes_hashed_while_they_are_copied(length: int) -> None:
    sealer = UnitSealer(**TRUTH)
    data = random.Random(length).randbytes(length)
    target = bytearray(length)
    content = sealer.copy(memoryview(data), memoryview(target))
    assert target == data
    assert sealer.seal(UNIT, content) == sealer.digest(UNIT, data)


@pytest.mark.parametrize("length", [PIECE_BYTES, 2 * PIECE_BYTES])
def test_the_copy_is_hashed_and_not_what_its_owner_may_change(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sender may reuse its block at any time; what was verified must be what is kept."""
    source, target = bytearray(b"1" * length), bytearray(length)

    class Late:
        """Everything is hashed after the sender's block has got another content."""

        def __init__(self, seed: int) -> None:
            self._hash = xxhash.xxh3_128(seed=seed)

        def update(self, data: memoryview) -> None:
            source[:] = b"2" * length
            self._hash.update(data)

        def digest(self) -> bytes:
            return self._hash.digest()

    def late_digest(data: memoryview, seed: int) -> bytes:
        source[:] = b"2" * length
        return xxhash.xxh3_128_digest(data, seed)

    sealer = UnitSealer(**TRUTH)
    late = SimpleNamespace(xxh3_128=Late, xxh3_128_digest=late_digest)
    with monkeypatch.context() as patched:
        patched.setattr(digest, "xxhash", late)
        content = sealer.copy(memoryview(source), memoryview(target))
    assert source == b"2" * length
    assert sealer.seal(UNIT, content) == sealer.digest(UNIT, memoryview(target))
