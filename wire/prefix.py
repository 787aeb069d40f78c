"""Names of cached prefixes: a chained hash per full block.

A block's hash covers everything before it, so equal hashes mean equal prefixes. The chain starts
from the model and the tenant's salt: prefixes of two tenants never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

HASH_BYTES = 16


def root_hash(model_fingerprint: str, cache_salt: str = "") -> bytes:
    """The chain's start for one model and one tenant salt."""
    key = blake2b(cache_salt.encode(), digest_size=32).digest()
    return blake2b(model_fingerprint.encode(), digest_size=HASH_BYTES, key=key).digest()


def child_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of the full block that holds `tokens` and follows `parent`."""
    content = np.asarray(tokens, dtype="<u4").tobytes()
    return blake2b(parent + content, digest_size=HASH_BYTES).digest()


def block_hashes(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """One hash per full block of `tokens`; a partial last block has none."""
    hashes = []
    parent = root
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = child_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes
