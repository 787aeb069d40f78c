"""What is compared does what it is compared for: it copies, and its digest knows every bit."""

from __future__ import annotations

import random

import pytest

from benchmarks import digests
from benchmarks.digests import Candidate
from kvtransfer.digest import PIECE_BYTES

FOUND, MISSING = digests.candidates()
SAME_NONCE = bytes(12)


def copied(candidate: Candidate, data: bytes) -> bytes:
    target = bytearray(len(data))
    digest = candidate.copy(memoryview(data), memoryview(target))
    assert target == data
    return digest


@pytest.mark.parametrize("candidate", FOUND, ids=lambda c: c.name)
@pytest.mark.parametrize("length", [16 << 10, PIECE_BYTES, PIECE_BYTES + (32 << 10)])
def test_a_digest_names_its_bytes(
    candidate: Candidate, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "new_nonce", lambda: SAME_NONCE)
    data = random.Random(length).randbytes(length)
    digest = copied(candidate, data)
    assert copied(candidate, data) == digest
    for place in (0, 1023, length // 2, length - 1):
        damaged = bytearray(data)
        damaged[place] ^= 0x10
        assert copied(candidate, bytes(damaged)) != digest


def test_nothing_is_missing_where_the_benchmarks_are_installed() -> None:
    assert not MISSING
