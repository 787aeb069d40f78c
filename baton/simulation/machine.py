"""Engines of one machine, which slow each other down while several compute.

They share cores, caches and the way to memory. A step is work in seconds of its own; while another
engine computes, it takes `slowdown` times as long:

    one    |=====|- - - - -|=====|        work of 10 + 5, alone but for the middle
    other        |- - - - -|
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from baton.simulation.clock import VirtualClock

DONE_S = 1e-9  # what is left by rounding


@dataclass(slots=True)
class _Step:
    left_s: float  # as if alone
    slowdown: float
    done: Callable[[], None]


class SharedMachine:
    """Steps that compute now, and when the next of them ends."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self._steps: list[_Step] = []
        self._settled_at = 0.0
        self._turn = 0  # ends that were set for an earlier one are void

    def compute(self, seconds: float, slowdown: float, done: Callable[[], None]) -> None:
        """Call `done` when a step of so many seconds is over."""
        self._settle()
        self._steps.append(_Step(seconds, slowdown, done))
        self._set_next()

    def _pace(self, step: _Step) -> float:
        """Seconds that one second of work takes now."""
        return step.slowdown if len(self._steps) > 1 else 1.0

    def _settle(self) -> None:
        """Take what was done since the last time from what is left."""
        passed = self._clock.now - self._settled_at
        self._settled_at = self._clock.now
        for step in self._steps:
            step.left_s -= passed / self._pace(step)

    def _set_next(self) -> None:
        self._turn += 1
        turn = self._turn
        if self._steps:
            after = min(step.left_s * self._pace(step) for step in self._steps)
            self._clock.after(max(0.0, after), lambda: self._end(turn))

    def _end(self, turn: int) -> None:
        if turn != self._turn:
            return
        self._settle()
        over = [step for step in self._steps if step.left_s <= DONE_S]
        self._steps = [step for step in self._steps if step.left_s > DONE_S]
        self._set_next()
        for step in over:
            step.done()
