"""What a step costs by what is in it, learned from steps that were measured.

    seconds = a + b * context + c * rows

the planner's form for decode steps. Measurements are kept by their number of rows, a few of each,
so that a long run of equal steps does not push out the others that the slope is known from. Of
each number the median counts, so a step that was interrupted is of no weight. What was measured
long ago, when the machine was perhaps busier, is left out as soon as there is better.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

KEPT = 9  # measurements of one kind of step
MAX_KINDS = 32
REFIT_EVERY = 32  # measurements; a fit takes a fifth of a millisecond
FEW_KINDS = 6  # up to here each new one is fitted at once
STALE_AFTER = 300  # measurements of other kinds


class _Kind:
    """The last measurements of one kind of step."""

    __slots__ = ("_median", "last", "seen")

    def __init__(self) -> None:
        self.seen: deque[tuple[float, ...]] = deque(maxlen=KEPT)
        self.last = 0  # when it was measured last, in measurements
        self._median: list[float] = []

    def add(self, measured: tuple[float, ...]) -> None:
        self.seen.append(measured)
        self._median = []

    @property
    def median(self) -> list[float]:
        """Of each column; `numpy.median` takes 30 times as long for so few numbers."""
        if not self._median:
            self._median = [median(column) for column in zip(*self.seen, strict=True)]
        return self._median


class LinearCosts:
    """Seconds as a linear function of features that are not negative; no coefficient is either."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[int, _Kind] = OrderedDict()  # measured last: last
        self._num_seen = 0
        self._num_new = 0
        self._fit: list[float] | None = None

    @property
    def num_kinds(self) -> int:
        """How many different kinds of steps were measured."""
        return len(self._kinds)

    def observe(self, kind: int, features: Sequence[float], seconds: float) -> None:
        """A step of this kind (its number of rows, or the like) took so long."""
        number = _rounded(kind)
        known = self._kinds.get(number)
        if known is None:
            known = self._kinds[number] = _Kind()
            if len(self._kinds) <= FEW_KINDS:
                self._fit = None
        self._kinds.move_to_end(number)
        known.add((seconds, *features))
        self._num_seen += 1
        known.last = self._num_seen
        if len(self._kinds) > MAX_KINDS:
            self._kinds.popitem(last=False)
        self._num_new += 1
        if self._num_new >= REFIT_EVERY:
            self._num_new, self._fit = 0, None

    def coefficients(self, num_features: int) -> list[float]:
        """The constant, then each feature's; zeros where nothing was measured."""
        if self._fit is None:
            self._fit = self._fitted(num_features).tolist()
        return self._fit

    def _fitted(self, num_features: int) -> NDArray[np.float64]:
        """Least squares of the relative error; a coefficient below zero is left out."""
        fit = np.zeros(1 + num_features)
        if not self._kinds:
            return fit
        kinds = self._fresh_kinds()
        medians = np.array([kind.median for kind in kinds])
        sure = np.sqrt([len(kind.seen) for kind in kinds])
        weights = sure / np.maximum(medians[:, 0], 1e-9)
        matrix = np.column_stack([np.ones(len(medians)), medians[:, 1:]]) * weights[:, None]
        used = list(range(1 + num_features))
        while used:
            solved = np.linalg.lstsq(matrix[:, used], sure, rcond=1e-6)[0]
            if (solved >= 0).all():
                fit[used] = solved
                break
            del used[int(solved.argmin())]
        return fit

    def _fresh_kinds(self) -> list[_Kind]:
        oldest = self._num_seen - STALE_AFTER
        fresh = [kind for kind in self._kinds.values() if kind.last > oldest]
        return fresh if len(fresh) > 1 else list(self._kinds.values())


def _rounded(kind: int) -> int:
    """Exact up to 16, then in steps of a sixteenth."""
    step = 1 << max(0, kind.bit_length() - 5)
    return kind // step * step
