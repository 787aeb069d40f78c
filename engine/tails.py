"""The last block of a prompt, for requests that have the same prompt: each begins with a copy.

    a prompt computed here      | full | full | tail ...|    findable under a hash of its own
    the same prompt once more   | same | same | copy ...|    only its last token is to be computed

The further choices of a request come one after the other, and all but their last token is known. A
tail cannot be shared as full blocks are, since each request writes on in it. The copy is made on
the device at the beginning of the request's first step; until that is committed, the request keeps
the block that it is copied from. Other nodes are not told of tails.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.prefix_cache import PrefixCache
from engine.request import Request


class Tails:
    """Finds and publishes them, for one engine."""

    def __init__(self, config: EngineConfig, pool: BlockPool, cache: PrefixCache) -> None:
        self._block_size = config.block_size
        self._pool = pool
        self._cache = cache

    def publish(self, request: Request) -> None:
        """Its last block is as it will stay, computed up to `num_computed_tokens`."""
        num_tokens = request.num_computed_tokens
        num_full, num_beyond = divmod(num_tokens, self._block_size)
        if num_beyond > 1:
            tail_hash = self._hash(request, num_full, num_tokens)
            self._cache.publish_tail(request.block_table[num_full], tail_hash)

    def find(self, request: Request, matched: Sequence[int]) -> int | None:
        """The block to copy for a request whose full blocks are `matched`, if that helps it."""
        num_tokens, start = request.num_tokens, len(matched) * self._block_size
        useful = 2 <= num_tokens - start <= self._block_size
        if not useful or request.needs_every_row:
            return None
        found = self._cache.match([self._hash(request, len(matched), num_tokens)])
        in_use = self._pool.num_cached_among([*matched, *found])
        return found[0] if found and self._pool.num_available > in_use else None

    def copy(self, request: Request, tail: int) -> None:
        """Give a request that is being admitted a block that will be like `tail`."""
        self._pool.acquire([tail], Owner.RUNNING)
        request.block_table += self._pool.allocate(1, Owner.RUNNING)
        request.copied_block = (tail, request.block_table[-1])
        request.num_computed_tokens = request.num_tokens - 1

    def _hash(self, request: Request, num_full: int, num_tokens: int) -> bytes:
        tokens = request.tokens[num_full * self._block_size : num_tokens]
        return self._cache.tail_hash(request.block_hashes[:num_full], tokens, request.cache_salt)
