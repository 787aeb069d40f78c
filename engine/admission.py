"""Whether a request may be let in, given what those before it hold and may come to need.

    blocks of one request:   | held | known to be needed now | predicted growth |
                             0                     ceil(num_tokens)     ceil(max_kv_tokens)

What is known to be needed must exist. Predicted growth must fit too, but it may be overcommitted,
because most requests end before their limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.request import Request
from engine.reservations import Reservations, Reserved
from wire.errors import CapacityError


class Admission:
    """Counts blocks against promises; decides, and changes nothing."""

    def __init__(self, config: EngineConfig, pool: BlockPool, reservations: Reservations) -> None:
        self._pool = pool
        self._config = config
        self._reservations = reservations
        self._overcommitted = int((config.kv_overcommit - 1) * config.num_blocks)

    def check_fits_pool(self, needed: int) -> None:
        """CapacityError for a request that would not fit if it were alone."""
        if needed > self._pool.num_blocks:
            raise CapacityError(f"{needed} blocks needed, the pool has {self._pool.num_blocks}")

    def most(self, request: Request) -> int:
        """Blocks that it can come to need."""
        return self._blocks(request, request.max_kv_tokens)

    def known(self, request: Request) -> int:
        """Blocks that it needs now."""
        if request.width == 1:
            return self._config.num_blocks_for(request.num_tokens)
        num_output = 1 if request.beams is None else request.beams.search.length
        return self._blocks(request, request.num_tokens + num_output)

    def _blocks(self, request: Request, num_tokens: int) -> int:
        shared = request.num_prompt_tokens
        return self._config.num_blocks_for_beams(shared, num_tokens, request.width)

    def fits(self, known: int, most: int, matched: Sequence[int], ahead: Iterable[Request]) -> bool:
        """Whether there is room behind `ahead` and all reservations, `matched` being cached.

        `known` blocks are needed now, and at most `most` later.
        """
        ahead = list(ahead)
        available = self._pool.num_available - self._pool.num_cached_among(matched)
        known -= len(matched)
        known += sum(max(0, self.known(r) - _held(r)) for r in ahead)
        promised = most - len(matched) + self.promised(ahead)
        return known <= available and promised <= available + self._overcommitted

    def fits_in_place(
        self, reserved: Reserved, num_tokens: int, matched: Sequence[int], admitted: list[Request]
    ) -> bool:
        """Whether a reservation may begin again in its own room.

        It has less of it than before: what a transfer may still write does not come back at once.
        """
        returning = len(reserved.received_ids) - self._pool.num_in_transfer(reserved.received_ids)
        available = self._pool.num_available - self._pool.num_cached_among(matched) + returning
        known = self._config.num_blocks_for(num_tokens) - len(matched)
        others = self.promised(admitted) - reserved.growth
        promised = reserved.max_blocks - len(matched) + others
        return known <= available and promised <= available + self._overcommitted

    def promised(self, admitted: Iterable[Request]) -> int:
        """Blocks that the admitted and the reserved may come to need beyond what they hold."""
        return self._reservations.growth + sum(self.most(r) - _held(r) for r in admitted)


def _held(request: Request) -> int:
    """Blocks that it holds; beams hold some together."""
    if request.beams is None:
        return len(request.block_table)
    return len({block for row in request.rows for block in row.block_table})
