"""Who may start now, who waits, and who is turned away: a bounded queue by priority and arrival.

A choice leaves the queue to ask a decode node for room; if it is refused it comes back to its old
place. Only a few of the queue may ask at the same time, and after a refusal nobody asks until
something may have changed: a full fleet is not flooded with questions.
"""

from __future__ import annotations

import itertools
from bisect import insort
from typing import Generic, TypeVar

from router.errors import queue_full

Key = TypeVar("Key")
_Place = tuple[int, int, int]  # priority, arrival, own number: the lowest goes first

MAX_PROBES = 4
MAX_BLOCKED_S = 1.0


class Admission(Generic[Key]):
    """`Key`s are hashable by identity; each is waiting, active, or unknown."""

    def __init__(self, max_active: int, max_waiting: int) -> None:
        self._max_active = max_active
        self._max_waiting = max_waiting
        self._numbers = itertools.count()
        self._place: dict[Key, _Place] = {}  # of everybody here
        self._waiting: list[tuple[_Place, Key]] = []
        self._probing: set[Key] = set()
        self._blocked_until = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        return len(self._place) - len(self._waiting)

    def check(self, count: int) -> None:
        """Raise ApiError (429) if `count` more would not fit."""
        would_wait = bool(self._waiting) or self.num_active + count > self._max_active
        if would_wait and len(self._waiting) + count > self._max_waiting:
            raise queue_full(retry_after_s=1.0)

    def new_arrival(self) -> int:
        """A place for what will enter later: it waits only behind those who came before now."""
        return next(self._numbers)

    def enter(self, key: Key, priority: int = 0, arrival: int | None = None) -> bool:
        """True: start at once. False: it waits, behind those of lower or equal `priority`.

        Args:
            arrival: when it came (`new_arrival`), if that was not now.
        """
        number = next(self._numbers)
        starts = not self._waiting and self.num_active < self._max_active
        self._place[key] = (priority, number if arrival is None else arrival, number)
        if not starts:
            self._insert(key)
        return starts

    def wait(self, key: Key, now: float, retry_after_s: float) -> None:
        """An active one was refused: back to its place, and nobody asks for a while."""
        self._probing.discard(key)
        self._insert(key)
        self._blocked_until = now + min(retry_after_s, MAX_BLOCKED_S)

    def _insert(self, key: Key) -> None:
        insort(self._waiting, (self._place[key], key))

    def settle(self, key: Key) -> None:
        """It got room."""
        self._probing.discard(key)

    def leave(self, key: Key) -> None:
        """It is over, wherever it was; somebody may have room now."""
        place = self._place.pop(key, None)
        self._probing.discard(key)
        if (place, key) in self._waiting:
            self._waiting.remove((place, key))  # type: ignore[arg-type]
        self.unblock()

    def unblock(self) -> None:
        """Something has changed: asking again makes sense."""
        self._blocked_until = 0.0

    def next(self, now: float) -> Key | None:
        """The first in line, if it may ask now; it is active from here on."""
        may_ask = now >= self._blocked_until and len(self._probing) < MAX_PROBES
        if not self._waiting or not may_ask or self.num_active >= self._max_active:
            return None
        _, key = self._waiting.pop(0)
        self._probing.add(key)
        return key
