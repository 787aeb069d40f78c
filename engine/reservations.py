"""Blocks for requests whose KV is computed elsewhere: reserved, filled by transfers, adopted.

    handles:  | found in the prefix cache | to be received ........ |
              0                 num_cached_tokens            num_tokens

What is received is trusted, and so findable by others, only once the reservation is adopted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from engine.block_pool import BlockPool, Owner
from engine.prefix_cache import PrefixCache
from wire.types import BlockHandle


@dataclass(frozen=True, slots=True)
class Reservation:
    """What the holder of a reservation may know and name."""

    id: int
    handles: tuple[BlockHandle, ...]  # of all blocks that hold `num_tokens` tokens
    num_tokens: int
    num_cached_tokens: int  # of these, computed already: nothing to send


@dataclass(frozen=True, slots=True)
class Reserved:
    """The engine's side of a reservation."""

    tokens: Sequence[int]
    block_ids: list[int]
    hashes: list[bytes]  # of all full blocks
    num_cached_blocks: int
    max_blocks: int  # that the request can come to need

    @property
    def growth(self) -> int:
        return self.max_blocks - len(self.block_ids)

    @property
    def received_ids(self) -> list[int]:
        """The blocks whose content is still to come."""
        return self.block_ids[self.num_cached_blocks :]


class Reservations:
    """All reservations of one engine. Admission is decided before; this holds and lets go."""

    def __init__(self, pool: BlockPool, cache: PrefixCache, block_size: int) -> None:
        self._pool = pool
        self._cache = cache
        self._block_size = block_size
        self._reserved: dict[int, Reserved] = {}
        self._ids = count(1)

    def open(
        self, tokens: Sequence[int], hashes: list[bytes], matched: list[int], max_blocks: int
    ) -> Reservation:
        """Hold the `matched` cached blocks and new ones for the rest of `tokens`."""
        self._pool.acquire(matched, Owner.LEASED)
        missing = -(-len(tokens) // self._block_size) - len(matched)
        block_ids = matched + self._pool.allocate(missing, Owner.LEASED)
        reservation = Reservation(
            id=next(self._ids),
            handles=self._pool.handles(block_ids),
            num_tokens=len(tokens),
            num_cached_tokens=len(matched) * self._block_size,
        )
        self._reserved[reservation.id] = Reserved(
            tokens, block_ids, hashes, len(matched), max_blocks
        )
        return reservation

    def rebind(
        self, reservation_id: int, tokens: Sequence[int], hashes: list[bytes], matched: list[int]
    ) -> Reservation:
        """The same room for what another sender will compute: a new reservation ends the old one.

        Nothing that was received is known to be right, so only the `matched` cached blocks keep
        their content. The others get new generations; those that a transfer may still write are
        left to quarantine and replaced.
        """
        max_blocks = self._reserved[reservation_id].max_blocks
        self.cancel(reservation_id)
        return self.open(tokens, hashes, matched, max_blocks)

    def peek(self, reservation_id: int) -> Reserved:
        """Raises KeyError where there is no such reservation (any more)."""
        return self._reserved[reservation_id]

    def adopt(self, reservation_id: int) -> Reserved:
        """End the reservation: its blocks are complete, findable, and a running request's."""
        reserved = self._reserved.pop(reservation_id)
        self._pool.hand_over(reserved.block_ids, Owner.LEASED, Owner.RUNNING)
        self._cache.publish(reserved.block_ids, reserved.hashes)
        return reserved

    def cancel(self, reservation_id: int) -> bool:
        """End the reservation and trust nothing that was received; False if it is not known."""
        reserved = self._reserved.pop(reservation_id, None)
        if reserved is None:
            return False
        verified = reserved.hashes[: reserved.num_cached_blocks]
        self._cache.release(reserved.block_ids, verified, Owner.LEASED)
        return True

    @property
    def growth(self) -> int:
        """Blocks that the reserved requests may come to need beyond what is held for them."""
        return sum(reserved.growth for reserved in self._reserved.values())

    @property
    def num_blocks(self) -> int:
        return sum(len(reserved.block_ids) for reserved in self._reserved.values())

    def __len__(self) -> int:
        return len(self._reserved)
