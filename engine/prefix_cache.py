"""Finds blocks by the content they hold: one chained hash per full block.

    hash[i] = H(hash[i-1], tokens of block i),   hash[-1] = root(model, tenant salt)

so one lookup per block walks the longest known prefix. The first block published under a hash is
the one found; an equal block computed at the same time stays private to its request.

Eviction takes suffixes before prefixes: tables are released from the back, and a block whose
content is published by another one refreshes that one instead. (Only a block that leaves quarantine
comes back alone; it may outlive its prefix, unreachable, until its turn comes.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from operator import not_

from engine.block_pool import BlockPool, Owner
from wire.prefix import block_hashes, child_hash, root_hash

MAX_PENDING_CHANGES = 1 << 16


@dataclass(frozen=True, slots=True)
class CacheChanges:
    """Hashes that became findable or ceased to be; in a `snapshot`, `added` is all there is."""

    added: tuple[bytes, ...]
    removed: tuple[bytes, ...]
    snapshot: bool = False

    def __bool__(self) -> bool:
        return self.snapshot or bool(self.added) or bool(self.removed)


class PrefixCache:
    """The findable blocks of one pool. Disabled, it knows no hashes and finds nothing."""

    def __init__(
        self,
        pool: BlockPool,
        block_size: int,
        model_fingerprint: str,
        *,
        enabled: bool = True,
        max_pending_changes: int = MAX_PENDING_CHANGES,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._model_fingerprint = model_fingerprint
        self._enabled = enabled
        self._block_of: dict[bytes, int] = {}
        self._tails: set[bytes] = set()  # of these hashes, what nobody is told of
        self._max_pending_changes = max_pending_changes
        # The last state of each hash that changed, not the net change: who took a snapshot in
        # between must still hear of the removal of what was in it.
        self._changed: dict[bytes, bool] = {}
        self._lost_changes = False
        pool.on_evict = self._forget

    # ------------------------------------------------------------ hashes

    def hashes(self, tokens: Sequence[int], cache_salt: str) -> list[bytes]:
        """One hash per full block of `tokens`; needs no lock."""
        if not self._enabled:
            return []
        root = root_hash(self._model_fingerprint, cache_salt)
        return block_hashes(tokens, self._block_size, root)

    def extend(self, hashes: list[bytes], tokens: Sequence[int], cache_salt: str) -> None:
        """Append to `hashes` what the full blocks of `tokens` still lack."""
        if not self._enabled:
            return
        size = self._block_size
        for start in range(len(hashes) * size, len(tokens) - size + 1, size):
            parent = hashes[-1] if hashes else root_hash(self._model_fingerprint, cache_salt)
            hashes.append(child_hash(parent, tokens[start : start + size]))

    def tail_hash(self, hashes: Sequence[bytes], tokens: Sequence[int], cache_salt: str) -> bytes:
        """Of a last block with `tokens` in it, behind full blocks with `hashes`.

        No full block has the hash of a partly filled one: it covers as many tokens as there are.
        """
        parent = hashes[-1] if hashes else root_hash(self._model_fingerprint, cache_salt)
        return child_hash(parent, tokens)

    # ------------------------------------------------------------ blocks

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix. They are found, not held: acquire them at once."""
        found = []
        for content_hash in hashes:
            block_id = self._block_of.get(content_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def publish(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> None:
        """Make held, completely computed blocks findable where their content is not yet."""
        found = self._block_of
        named = zip(hashes, block_ids, strict=False)
        new = {name: block_id for name, block_id in named if name not in found}
        if new:
            self._pool.publish(new)
            found.update(new)
            self._changed.update(dict.fromkeys(new, True))
            self._keep_few_changes()

    def publish_tail(self, block_id: int, tail_hash: bytes) -> None:
        """Make a held, partly filled block findable that nobody writes to any more."""
        if self._enabled and tail_hash not in self._block_of:
            self._pool.publish({tail_hash: block_id})
            self._block_of[tail_hash] = block_id
            self._tails.add(tail_hash)

    def release(self, block_ids: Sequence[int], hashes: Sequence[bytes], owner: Owner) -> None:
        """Drop a table's references, back to front; `hashes` cover its complete, sound blocks."""
        own = self._finds(block_ids, hashes)
        if not own:
            self.publish(block_ids, hashes)
            own = self._finds(block_ids, hashes)
        if own:
            self._pool.release(reversed(block_ids), owner)  # to touch one's own changes nothing
            return
        for index in reversed(range(len(block_ids))):
            self._pool.release([block_ids[index]], owner)
            if index < len(hashes):
                self._pool.touch(self._block_of[hashes[index]])

    def _finds(self, block_ids: Sequence[int], hashes: Sequence[bytes]) -> bool:
        """Whether just these blocks are the ones found under their names."""
        return list(map(self._block_of.get, hashes)) == block_ids[: len(hashes)]

    def discard(self, block_ids: Sequence[int]) -> None:
        """Make blocks not findable any more, whoever holds them."""
        for block_id in block_ids:
            content_hash = self._pool.content_hash(block_id)
            if content_hash is not None:
                self._pool.unpublish(block_id)
                self._forget([content_hash])

    def _forget(self, hashes: Sequence[bytes]) -> None:
        found = self._block_of
        for content_hash in hashes:
            del found[content_hash]
        told = dict.fromkeys(hashes, False)
        for tail in self._tails.intersection(hashes):
            self._tails.remove(tail)
            del told[tail]
        self._changed.update(told)
        self._keep_few_changes()

    # ------------------------------------------------------------ telling others

    def _keep_few_changes(self) -> None:
        if len(self._changed) > self._max_pending_changes:
            self._changed.clear()
            self._lost_changes = True

    def take_events(self) -> CacheChanges:
        """What changed since the last call; a snapshot if nobody called for too long."""
        changed, self._changed = self._changed, {}
        lost, self._lost_changes = self._lost_changes, False
        if lost:
            return CacheChanges(self.snapshot(), (), snapshot=True)
        added = tuple(compress(changed, changed.values()))
        removed = tuple(compress(changed, map(not_, changed.values())))
        return CacheChanges(added, removed)

    def snapshot(self) -> tuple[bytes, ...]:
        """All findable hashes of full blocks."""
        return tuple(h for h in self._block_of if h not in self._tails)

    def __len__(self) -> int:
        return len(self._block_of)

    def check_integrity(self) -> None:
        """Raise AssertionError where the index and the pool disagree. O(blocks)."""
        for content_hash, block_id in self._block_of.items():
            actual = self._pool.content_hash(block_id)
            assert actual == content_hash, f"block {block_id} is indexed under another content"
        published = sum(
            self._pool.content_hash(block_id) is not None
            for block_id in range(self._pool.num_blocks)
        )
        assert published == len(self._block_of), (
            f"{published} blocks are published, {len(self._block_of)} can be found"
        )
