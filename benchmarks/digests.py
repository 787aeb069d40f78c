"""Candidates for the digest of a unit's bytes: each copies a unit and says what the copy is.

All hash the copy piece by piece, while it is in the processor's cache, as the product does; how a
hash can be fed decides the rest. What a candidate is worth is its `strength`:

    detection       finds every fault, but whoever knows how it works can make bytes that pass
    authentication  without the key nobody can
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import xxhash

from kvtransfer.digest import PIECE_BYTES

KEY = secrets.token_bytes(32)
Make = Callable[[memoryview, memoryview], bytes]
"""Copies the first view into the second, of the same length, and returns the copy's digest."""


@dataclass(frozen=True)
class Candidate:
    """One way to make a digest."""

    name: str
    strength: str
    copy: Make


class Hash(Protocol):
    """What hashlib calls a hash object."""

    def update(self, data: memoryview) -> Any: ...
    def digest(self) -> bytes: ...


def candidates() -> tuple[list[Candidate], list[str]]:
    """All that can be made here, and the packages that others lack."""
    found = [
        Candidate("XXH3-128 seeded", "detection 2^-128", in_pieces(_xxh3, _xxh3_at_once)),
        Candidate("XXH3-128 after the copy", "detection 2^-128", _xxh3_afterwards),
        Candidate("BLAKE2b keyed", "authentication", in_pieces(_blake2b)),
        Candidate("NH x1 + BLAKE2b", "authentication 2^-32", in_pieces(lambda: NH(1))),
        Candidate("NH x2 + BLAKE2b", "authentication 2^-64", in_pieces(lambda: NH(2))),
    ]
    missing = []
    for package, make in (("blake3", _blake3), ("cryptography", _gmac)):
        try:
            found.append(make())
        except ImportError:
            missing.append(package)
    return found, missing


def in_pieces(
    make_hash: Callable[[], Hash], at_once: Callable[[memoryview], bytes] | None = None
) -> Make:
    """Hash each piece right after it was copied; a unit of one piece `at_once`, if that is less."""

    def copy(source: memoryview, target: memoryview) -> bytes:
        if at_once is not None and len(target) <= PIECE_BYTES:
            target[:] = source
            return at_once(target)
        state = make_hash()
        for start in range(0, len(target), PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            piece[:] = source[start : start + PIECE_BYTES]
            state.update(piece)
        return state.digest()

    return copy


def copy_alone(source: memoryview, target: memoryview) -> bytes:
    """The floor."""
    target[:] = source
    return b""


def _xxh3() -> Hash:
    return xxhash.xxh3_128(seed=7)


def _xxh3_at_once(data: memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data, 7)


def _xxh3_afterwards(source: memoryview, target: memoryview) -> bytes:
    target[:] = source
    return _xxh3_at_once(target)


def _blake2b() -> Hash:
    return blake2b(key=KEY, digest_size=16)


def _blake3() -> Candidate:
    import blake3

    return Candidate(
        "BLAKE3 keyed", "authentication 2^-128", in_pieces(lambda: blake3.blake3(key=KEY))
    )


def new_nonce() -> bytes:
    """Random here; the product would take the unit's number."""
    return secrets.token_bytes(12)


def _gmac() -> Candidate:
    """AES-GCM without a plaintext. A nonce must never come twice under one key."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    class Gmac:
        def __init__(self) -> None:
            self._state = Cipher(algorithms.AES(KEY[:16]), modes.GCM(new_nonce())).encryptor()
            self.update = self._state.authenticate_additional_data

        def digest(self) -> bytes:
            self._state.finalize()
            return self._state.tag

    cipher = AESGCM(KEY[:16])

    def at_once(data: memoryview) -> bytes:
        return cipher.encrypt(new_nonce(), b"", data)

    return Candidate("AES-GMAC", "authentication 2^-128", in_pieces(Gmac, at_once))


class NH:
    """The universal hash of UMAC (Black, Halevi, Krawczyk, Krovetz, Rogaway 1999, section 4).

    Each block of 1 KiB becomes, per pass, the sum over its pairs of words of
    (m1 + k1 mod 2^32) * (m2 + k2 mod 2^32) mod 2^64: two messages collide with probability 2^-32.
    A keyed BLAKE2b of these sums, 128 times shorter than the bytes, is the authenticator. Nothing
    here needs an order, so a GPU could do the same beside its pool.
    """

    _BLOCK_WORDS = 256
    _TOEPLITZ_SHIFT = 4  # words by which the key of each further pass is shifted (section 4.2)

    def __init__(self, num_passes: int) -> None:
        self._num_passes = num_passes
        self._sums = _blake2b()

    def update(self, data: memoryview) -> None:
        words = np.frombuffer(data, np.uint32).reshape(-1, self._BLOCK_WORDS)
        for number in range(self._num_passes):
            start = number * self._TOEPLITZ_SHIFT
            keyed = words + _NH_KEY[start : start + self._BLOCK_WORDS]
            low, high = keyed[:, 0::2].astype(np.uint64), keyed[:, 1::2].astype(np.uint64)
            self._sums.update(np.einsum("bw,bw->b", low, high).data)

    def digest(self) -> bytes:
        return self._sums.digest()


_NH_KEY = np.frombuffer(secrets.token_bytes(4 * 264), np.uint32)
