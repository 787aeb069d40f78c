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

import numpy as np
from numpy.typing import NDArray

KEPT = 9  # measurements of one kind of step
MAX_KINDS = 32
REFIT_EVERY = 32  # measurements; a fit takes half a millisecond
STALE_AFTER = 300  # measurements of other kinds


class LinearCosts:
    """Seconds as a linear function of features that are not negative; no coefficient is either."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, deque[tuple[float, ...]]] = OrderedDict()
        self._last: dict[int, int] = {}  # when a kind was measured, in measurements
        self._num_seen = 0
        self._num_new = 0
        self._fit: NDArray[np.float64] | None = None

    @property
    def num_kinds(self) -> int:
        """How many different kinds of steps were measured."""
        return len(self._seen)

    def observe(self, kind: int, features: Sequence[float], seconds: float) -> None:
        """A step of this kind (its number of rows, or the like) took so long."""
        kind = _rounded(kind)
        kept = self._seen.setdefault(kind, deque(maxlen=KEPT))
        self._seen.move_to_end(kind)
        kept.append((seconds, *features))
        self._num_seen += 1
        self._last[kind] = self._num_seen
        if len(self._seen) > MAX_KINDS:
            forgotten, _ = self._seen.popitem(last=False)
            del self._last[forgotten]
        self._num_new += 1
        if self._num_new >= REFIT_EVERY or len(kept) == 1:
            self._num_new, self._fit = 0, None

    def seconds(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """For features [..., F]; zeros where nothing was measured."""
        if self._fit is None:
            self._fit = self._fitted(features.shape[-1])
        seconds: NDArray[np.float64] = features @ self._fit[1:] + self._fit[0]
        return seconds

    def _fitted(self, num_features: int) -> NDArray[np.float64]:
        """Least squares of the relative error; a coefficient below zero is left out."""
        fit = np.zeros(1 + num_features)
        if not self._seen:
            return fit
        kinds = self._fresh_kinds()
        medians = np.array([np.median(np.array(kept), axis=0) for kept in kinds])
        sure = np.sqrt([len(kept) for kept in kinds])
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

    def _fresh_kinds(self) -> list[deque[tuple[float, ...]]]:
        oldest = self._num_seen - STALE_AFTER
        fresh = [kept for kind, kept in self._seen.items() if self._last[kind] > oldest]
        return fresh if len(fresh) > 1 else list(self._seen.values())


def _rounded(kind: int) -> int:
    """Exact up to 16, then in steps of a sixteenth."""
    step = 1 << max(0, kind.bit_length() - 5)
    return kind // step * step
