"""Names of cached prefixes: a chained hash per full block.

A block's hash covers everything before it, so equal hashes mean equal prefixes. The chain starts
from the model and the tenant's salt: prefixes of two tenants never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from struct import pack

HASH_BYTES = 16
_TOKEN_BYTES = 4


def root_hash(model_fingerprint: str, cache_salt: str = "") -> bytes:
    """The chain's start for one model and one tenant salt."""
    key = blake2b(cache_salt.encode(), digest_size=32).digest()
    return blake2b(model_fingerprint.encode(), digest_size=HASH_BYTES, key=key).digest()


def child_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of the full block that holds `tokens` and follows `parent`."""
    return _chained(parent, _content(tokens))


def _content(tokens: Sequence[int]) -> bytes:
    return pack(f"<{len(tokens)}I", *tokens)


def _chained(parent: bytes, content: bytes) -> bytes:
    return blake2b(parent + content, digest_size=HASH_BYTES).digest()


def block_hashes(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """One hash per full block of `tokens`; a partial last block has none."""
    hashes = []
    parent, content = root, _content(tokens)
    size = block_size * _TOKEN_BYTES
    for start in range(0, len(content) - size + 1, size):
        parent = _chained(parent, content[start : start + size])
        hashes.append(parent)
    return hashes
