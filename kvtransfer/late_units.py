"""Units of one connection that a device copies: they are over later, and in any order.

The sender is told in the order in which it sent them, because it is told a number. A pool stays
mapped until nothing of it is read any more, whatever becomes of the connection.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.device_pool import ForeignPool
from kvtransfer.shm_stream import PlacedUnit
from kvtransfer.transport import DeviceLanding, Landing
from wire.handoff_messages import UnitHeader

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Turn:
    over: bool = False


class LateUnits:
    """See the module's docstring.

    Args:
        begin: where a unit goes; None: nowhere.
        on_over: told how many more of the first units are over.
    """

    def __init__(
        self,
        pool: ForeignPool,
        begin: Callable[[UnitHeader], Landing | None],
        on_over: Callable[[int], None],
    ) -> None:
        self._pool = pool
        self._begin = begin
        self._on_over = on_over
        self._line: deque[_Turn] = deque()
        self._closed = False

    def take(self, units: Iterable[PlacedUnit]) -> None:
        """Have them put where their leases say, or drop them."""
        for unit in units:
            turn = _Turn()
            self._line.append(turn)
            over = partial(self._over, turn)
            try:
                self._take(unit, over)
            except Exception:  # a bug there must not end the connection for the others' units
                log.exception("a unit was not handled")
                over()

    def close(self) -> None:
        """The connection has ended."""
        self._closed = True
        self._close_pool()

    def _take(self, unit: PlacedUnit, over: Callable[[], None]) -> None:
        landing = self._begin(unit.header)
        if landing is None:
            over()
        elif unit.inline is not None:
            landing.fill(memoryview(unit.inline))
            landing.end(len(unit.inline))  # of a copy: the sender's block is not read
            over()
        else:
            source = self._pool.part(unit.offset, unit.header.num_bytes)
            assert isinstance(source, DeviceBytes)
            assert isinstance(landing, DeviceLanding)
            landing.take(source, over)

    def _over(self, turn: _Turn) -> None:
        turn.over = True
        count = 0
        while self._line and self._line[0].over:
            self._line.popleft()
            count += 1
        if self._closed:
            self._close_pool()
        elif count:
            self._on_over(count)

    def _close_pool(self) -> None:
        if not self._line:
            self._pool.close()
