"""One histogram's counts, kept where things happen and exported when Prometheus asks.

For what is counted on a node's hot path, beside the plain counters of its stats: no lock, no
registry, and two additions per observation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from telemetry.metrics import Metric


class Buckets:
    """How many observations were at most each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)  # the last one: more than every bound

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @classmethod
    def of(cls, metric: Metric) -> Buckets:
        return cls(metric.buckets)

    @property
    def count(self) -> int:
        return sum(self._counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound as Prometheus writes it, observations up to it), ending with +Inf."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        counts = map(float, accumulate(self._counts))
        return list(zip(names, counts, strict=True))
