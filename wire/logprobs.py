"""Log-probabilities as they travel: one packed row per token.

    row:  | rank, logprob | of the token itself, then | id, logprob | of the best, best first

Each pair is a little-endian uint32 and a float32, so a row with the best k takes 8 (1 + k) bytes;
as msgpack objects it would be longer and slower to check. They are log-softmax of the model's raw
logits: before penalties, bias, temperature and filters.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

MAX_TOP_LOGPROBS = 128
"""No request gets more alternatives per token than this, whatever its router allows."""

PAIR_BYTES = 8
MAX_PAIRS = 4 << 20
"""Pairs of one request, its prompt and its longest output together: 32 MiB, a quarter of the
largest message, since whoever takes a request over tells all of them at once."""

UNKNOWN = b""
"""In place of a row that its sender does not have: the token came from an earlier attempt."""

_PAIR = struct.Struct("<If")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One row, unpacked."""

    logprob: float
    rank: int  # 1: no token is more probable
    top: tuple[tuple[int, float], ...]  # (id, logprob), best first


def pack(row: TokenLogprobs) -> bytes:
    """The bytes of one row."""
    pairs = ((row.rank, row.logprob), *row.top)
    return b"".join(_PAIR.pack(number, logprob) for number, logprob in pairs)


def unpack(row: bytes) -> TokenLogprobs:
    """What `pack` packed; `row` is not UNKNOWN."""
    (rank, logprob), *top = _PAIR.iter_unpack(row)
    return TokenLogprobs(logprob, rank, tuple(top))


def _check(row: bytes) -> bytes:
    if len(row) % PAIR_BYTES:
        raise ValueError("a row is made of pairs")
    if row and row[:4] == bytes(4):
        raise ValueError("ranks begin with 1")
    if not all(logprob <= 0 for _, logprob in _PAIR.iter_unpack(row)):
        raise ValueError("a logprob is positive or not a number")
    return row


Row = Annotated[
    bytes,
    Field(strict=True, max_length=PAIR_BYTES * (1 + MAX_TOP_LOGPROBS)),
    AfterValidator(_check),
]
Rows = Annotated[tuple[Row, ...], Field(max_length=1 << 20, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What goes with output tokens, for a request that asks for it."""

    tokens: Rows = ()  # one per output token beside it, or none
    prompt: Rows = ()  # with the first output token: one per prompt token but the first, or none
