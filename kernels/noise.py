"""Sampling noise as a pure function of (seed, position, token id): Gumbel variates without a state.

    (seed, position)  ── SplitMix64 ──▶  64-bit key, two 32-bit words
    (key, token id)   ── mix32(mix32(id ^ word 0) + word 1) ──▶  32 bits  ──▶  Gumbel

The key is the `position`-th output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) started at the
mixed seed, so positions of one seed never share a key. `mix32` is a bijection of 32 bits with full
avalanche (two multiplications; constants found by C. Wellons' hash-prospector); applied twice with
a key word in between it decorrelates neighbouring ids, and one key never repeats a value.

Everything is integer arithmetic modulo 2^32 or 2^64 until the last two logarithms, so a kernel can
compute the same bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOISE_BITS = 31
GUMBEL_MAX = -math.log(-math.log1p(-(2.0 ** -(NOISE_BITS + 1))))  # 22.18
GUMBEL_MIN = -math.log(24 * math.log(2.0))  # -2.81

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int, bits: int) -> int:
    """The two's complement reading of an unsigned constant; torch multiplies signed words."""
    return value - (1 << bits) if value >> (bits - 1) else value


def mix32(x: Tensor) -> Tensor:
    """A bijection of int32 words in which every input bit flips every output bit half the time."""
    x = (x ^ (x >> 16 & 0xFFFF)) * _signed(0x21F0AAAD, 32)
    x = (x ^ (x >> 15 & 0x1FFFF)) * _signed(0xD35A2D97, 32)
    return x ^ (x >> 15 & 0x1FFFF)


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 words."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * _signed(0x94D049BB133111EB, 64)
    return x ^ (x >> 31 & (1 << 33) - 1)


def row_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """int64 seeds (u64 bit patterns) and positions, both [R] → key words, int32 [R, 2]."""
    golden = _signed(_GOLDEN, 64)
    keys = mix64(mix64(seeds + golden) + (positions + 1) * golden)
    return keys.unsqueeze(-1).view(torch.int32)  # low word first


def random_integers(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Uniform integers in [0, 2^31), int32: keys [..., 2], int32 ids broadcast against [...]."""
    bits = mix32(mix32(token_ids ^ keys[..., 0]) + keys[..., 1])
    return bits >> 1 & 0x7FFFFFFF


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Gumbel noise of each token id under its row's key, fp32, in [GUMBEL_MIN, GUMBEL_MAX].

    The winner of a Gumbel-max draw sits in the upper tail, so that is where the resolution goes:
    -log1p(-v) keeps 31 bits near v = 0, where -log(u) would keep 24 near u = 1.
    Shapes as for `random_integers`.
    """
    v = (random_integers(keys, token_ids).float() + 0.5) * 2.0**-NOISE_BITS
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))
