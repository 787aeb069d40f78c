"""Keyed digests: a unit's bytes, bound to what they are supposed to be.

    digest = BLAKE2b(key = the lease's, token, layer and head range | chained hash of the whole
                     prefix | XXH3-128(bytes, seed from the key) | lease | attempt | request)

The prefix hash names every token up to the unit's end (with adapter and tenant salt), so bytes that
belong to another prompt, another place or another attempt never verify. XXH3 is the only pass over
the bytes, at memory speed.

Strength: this detects faults (bits, stale or swapped blocks, truncation, mix-ups) with a failure
probability around 2^-128. It is no proof against somebody who can choose the KV bytes and knows the
key; who may talk to a node at all is the socket layer's concern.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

import xxhash

from kvtransfer.units import Unit
from wire.prefix import child_hash, root_hash
from wire.types import AttemptId

DIGEST_BYTES = 16
_PLACE = struct.Struct("<QQIIII")
PIECE_BYTES = 128 << 10  # copied and hashed in one go


class UnitSealer:
    """Computes the digests of one lease's units; sender and receiver each make their own.

    Args:
        key: the lease's digest key.
        tokens: the tokens whose KV is handed over.
        block_size: the receiver's.
    """

    def __init__(
        self,
        *,
        key: bytes,
        id: AttemptId,
        lease: int,
        tokens: Sequence[int],
        block_size: int,
        model_fingerprint: str,
        cache_salt: str,
    ) -> None:
        self._key = key
        self._seed = int.from_bytes(blake2b(key, digest_size=8).digest(), "little")
        self._context = f"{lease:x}/{id.attempt}/{id.request}".encode()
        self._chain = _prefix_chain(tokens, block_size, root_hash(model_fingerprint, cache_salt))

    @property
    def seed(self) -> int:
        """Of the hash of the bytes alone."""
        return self._seed

    def digest(self, unit: Unit, data: bytes | memoryview) -> bytes:
        """The digest of `data` as the content of `unit`."""
        return self.seal(unit, content_of(data, self._seed))

    def seal(self, unit: Unit, content: bytes) -> bytes:
        """The same where the bytes were hashed before, with `seed`."""
        place = _PLACE.pack(
            unit.token_start,
            unit.token_end,
            unit.layer_start,
            unit.layer_end,
            unit.head_start,
            unit.head_end,
        )
        sealed = place + self._chain[unit.block] + content + self._context
        return blake2b(sealed, digest_size=DIGEST_BYTES, key=self._key).digest()

    def copy(self, data: memoryview, target: memoryview) -> bytes:
        """Copy `data` to `target`, of the same length; returns the target's content hash.

        What was copied is hashed before it leaves the processor's cache: half the cost of a pass of
        its own over a megabyte (`docs/log.md`).
        """
        if len(target) <= PIECE_BYTES:
            target[:] = data
            return xxhash.xxh3_128_digest(target, self._seed)
        content = xxhash.xxh3_128(seed=self._seed)
        for start in range(0, len(target), PIECE_BYTES):
            piece = target[start : start + PIECE_BYTES]
            piece[:] = data[start : start + PIECE_BYTES]
            content.update(piece)
        return content.digest()


def content_of(data: bytes | memoryview, seed: int) -> bytes:
    """The one pass over a unit's bytes; what a device computes is the same."""
    return xxhash.xxh3_128_digest(data, seed)


def _prefix_chain(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """Per block, a partly filled last one included, the hash of all tokens up to its end."""
    chain = []
    parent = root
    for start in range(0, len(tokens), block_size):
        parent = child_hash(parent, tokens[start : start + block_size])
        chain.append(parent)
    return chain
