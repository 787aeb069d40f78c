"""XXH3-128 with a seed, in the parts that a device computes and those that the host does.

The hash (xxHash specification 0.8, section XXH3) keeps 8 accumulators of 64 bits and reads its
input in stripes of 64 bytes, 16 of which make a block:

    within a block    acc[i] += sum over stripes of low32(x) * high32(x) + data[i ^ 1],
                      x = data[i] ^ secret[stripe + i]
    after a block     acc[i] = (acc[i] ^ acc[i] >> 47 ^ secret[16 + i]) * prime

Only the second line needs the blocks in order, and it is an eighth of a thousandth of the work: the
sums of all blocks can be taken at once, beside the copy that they cover. What is left for the host
are 64 bytes per input. `accumulate` is the reference; `kernels.triton_digest` does the same.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIN_BYTES = 256  # shorter inputs are hashed another way, up to 240 bytes
LANES = 8
BLOCK_WORDS = 128
LAST_WORDS = 24  # where the secret of the last stripe starts among `secret_words`

Words: TypeAlias = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_PRIME32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIME64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_FIRST = (_PRIME32[2], *_PRIME64[:4], _PRIME32[1], _PRIME64[4], _PRIME32[0])
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def seeded_secret(seed: int) -> bytes:
    """The 192 bytes that a seed makes of the constant ones."""
    words = struct.unpack("<24Q", _SECRET)
    return struct.pack(
        "<24Q", *((w + (seed if i % 2 == 0 else -seed)) & _MASK for i, w in enumerate(words))
    )


def secret_words(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [40]: the secret, that of the last stripe, and the accumulators' first values."""
    secret = seeded_secret(seed)
    words = struct.unpack("<24q", secret) + struct.unpack("<8q", secret[121:185])
    first = struct.unpack("<8q", struct.pack("<8Q", *_FIRST))
    return torch.tensor(words + first, device=device)


def accumulate(data: Tensor, secret: Tensor) -> Tensor:
    """The accumulators int64 [U, 8] of inputs [U, words] of int64, for `secret_words`."""
    num_inputs, num_words = data.shape
    acc = secret[LAST_WORDS + LANES :].expand(num_inputs, LANES)
    num_blocks = (num_words * 8 - 1) // (BLOCK_WORDS * 8)
    for start in range(0, num_blocks * BLOCK_WORDS, BLOCK_WORDS):
        block = data[:, start : start + BLOCK_WORDS]
        acc = acc + _sums(block.reshape(num_inputs, -1, LANES), secret)
        acc = (acc ^ (acc >> 47 & 0x1FFFF) ^ secret[16:24]) * _PRIME32[0]
    rest = (num_words - 1) // LANES * LANES
    tail = data[:, num_blocks * BLOCK_WORDS : rest].reshape(num_inputs, -1, LANES)
    acc = acc + _sums(tail, secret)
    return acc + _sums(data[:, None, -LANES:], secret[LAST_WORDS:])


def _sums(stripes: Tensor, secret: Tensor) -> Tensor:
    """[U, 8] of stripes [U, stripes, 8], whose secrets start one word after the other."""
    lane = torch.arange(LANES, device=stripes.device)
    keyed = stripes ^ secret[torch.arange(stripes.shape[1], device=lane.device)[:, None] + lane]
    products = (keyed & 0xFFFFFFFF) * (keyed >> 32 & 0xFFFFFFFF)
    return (products + stripes[..., lane ^ 1]).sum(1)


def finish(accumulators: Tensor, num_bytes: int, seed: int) -> list[bytes]:
    """The digests, as `xxhash.xxh3_128_digest` gives them, of inputs of `num_bytes` each.

    All rows at once: one by one they take as long as hashing half a megabyte.
    """
    assert num_bytes >= MIN_BYTES, f"{num_bytes} bytes are hashed another way"
    acc = accumulators.cpu().numpy().view(np.uint64)
    secret = seeded_secret(seed)
    starts = (num_bytes * _PRIME64[0] & _MASK, ~(num_bytes * _PRIME64[1]) & _MASK)
    low, high = (
        _merged(acc, np.frombuffer(secret, np.uint64, LANES, at), start)
        for at, start in zip((11, 117), starts, strict=True)
    )
    digests = np.stack([high, low], axis=1).astype(">u8").tobytes()
    return [digests[i : i + 16] for i in range(0, len(digests), 16)]


def _merged(acc: Words, secret: Words, start: int) -> Words:
    """[U] of accumulators [U, 8]."""
    keyed = acc ^ secret
    folded = _folded(keyed[:, ::2], keyed[:, 1::2])
    total: Words = np.uint64(start) + folded.sum(axis=1, dtype=np.uint64)
    total = (total ^ total >> np.uint64(37)) * np.uint64(0x165667919E3779F9)
    total ^= total >> np.uint64(32)
    return total


def _folded(a: Words, b: Words) -> Words:
    """Both halves of each product of 128 bits, one on the other; numpy has 64 bits only."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    cross = (a & low) * (b >> half)
    other = (a >> half) * (b & low) + (cross & low) + ((a & low) * (b & low) >> half)
    upper: Words = (a >> half) * (b >> half) + (cross >> half) + (other >> half)
    upper ^= a * b
    return upper
