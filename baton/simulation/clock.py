"""Virtual time: what is to happen, in order; equal times in the order in which they were set."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

Action = Callable[[], None]


class VirtualClock:
    """Time passes only from one action to the next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._actions: list[tuple[float, int, Action]] = []

    def at(self, time: float, action: Action) -> None:
        """Do `action` at `time`, or now if that is past."""
        heapq.heappush(self._actions, (max(time, self.now), next(self._order), action))

    def after(self, seconds: float, action: Action) -> None:
        self.at(self.now + seconds, action)

    def step(self) -> bool:
        """Do the next action; False if there is none."""
        if not self._actions:
            return False
        self.now, _, action = heapq.heappop(self._actions)
        action()
        return True
