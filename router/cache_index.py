"""Which prefix blocks a node says it holds, kept right by numbered events and snapshots."""

from __future__ import annotations

from collections.abc import Sequence

from wire.fleet_messages import CacheEvents

_ASK_AGAIN_AFTER = 256  # messages dropped while a snapshot is awaited


class CacheIndex:
    """Block hashes of one node's prefix cache, at most `limit` of them.

    It is a hint: a wrong entry costs a detour, never a wrong token.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.hashes: set[bytes] = set()
        self._last_number: int | None = None  # None: a snapshot is awaited
        self._num_dropped = 0

    def __len__(self) -> int:
        return len(self.hashes)

    def apply(self, events: CacheEvents) -> bool:
        """Take over one message; False where events are missing and a snapshot must be asked."""
        if events.snapshot:
            self.hashes.clear()
        elif self._last_number is None:
            self._num_dropped += 1
            return self._num_dropped % _ASK_AGAIN_AFTER != 0
        elif events.number != self._last_number + 1:
            self._last_number, self._num_dropped = None, 0
            return False
        self._last_number = events.number
        self.hashes.difference_update(events.removed)
        self.hashes.update(events.added[: max(0, self._limit - len(self.hashes))])
        return True

    def num_cached_blocks(self, hashes: Sequence[bytes]) -> int:
        """How many blocks from the first on are here."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self.hashes:
                return count
        return len(hashes)
