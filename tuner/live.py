"""Keeps a latency model true to the machines that serve: one factor per formula. Pure.

A node counts its steps of either kind: how many, the variables of the formula summed up, and the
seconds that they took. The formulas are linear, so what they say of all steps between two counts is
what they say of the sums; measured over predicted is how much slower the node is than the profile.

    factor = weighted median of the last such ratios, and of the profile's own word for 1

A median, as some ratios are of a node that was just disturbed; a factor, as live load is too
much alike to tell coefficients apart. It is forgotten after a while, and stays within bounds: who
is four times as slow as its profile has another profile's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tuner.latency import LatencyModel, predict
from wire.types import StepSums

MEMORY = 256  # ratios, and
MEMORY_S = 120.0  # none older than that
PROFILE_S = 2.0  # so many seconds of steps must say otherwise before the profile is doubted
LEAST_S = 0.005  # of steps make a ratio
BOUND = 4.0
MAX_NODES = 4096


@dataclass(frozen=True, slots=True)
class _Ratio:
    at: float
    ratio: float
    weight_s: float


@dataclass(slots=True)
class _Formula:
    """One of a profile's formulas, and what was seen of it lately."""

    coefficients: tuple[float, float, float]
    ratios: deque[_Ratio] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def take(self, variables: tuple[float, float, float], seconds: float, now: float) -> None:
        predicted = predict(self.coefficients, variables)
        if predicted > 0 and seconds >= LEAST_S:
            self.ratios.append(_Ratio(now, seconds / predicted, predicted))

    def factor(self, now: float) -> float:
        while self.ratios and self.ratios[0].at < now - MEMORY_S:
            self.ratios.popleft()
        seen = [(one.ratio, one.weight_s) for one in self.ratios]
        return min(max(weighted_median([*seen, (1.0, PROFILE_S)]), 1 / BOUND), BOUND)


def weighted_median(values: Iterable[tuple[float, float]]) -> float:
    """The value below which half of the weight lies; there must be one."""
    ordered = sorted(values)
    half, below = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        below += weight
        if below >= half:
            return value
    return ordered[-1][0]


class LiveModel:
    """A profile's model with factors that follow its nodes."""

    def __init__(self, profile: LatencyModel) -> None:
        self._profile = profile
        self._prefill = _Formula(profile.prefill)
        self._decode = _Formula(profile.decode)
        self._counts: OrderedDict[str, tuple[StepSums, StepSums]] = OrderedDict()

    def report(self, node: str, prefill: StepSums, decode: StepSums, now: float) -> None:
        """A life of a node, and what it has counted so far."""
        before = self._counts.pop(node, None)
        self._counts[node] = (prefill, decode)
        if len(self._counts) > MAX_NODES:
            self._counts.popitem(last=False)
        if before is None:  # it may have counted for days
            return
        _take(self._prefill, before[0], prefill, now)
        _take(self._decode, before[1], decode, now)

    def factors(self, now: float) -> dict[str, float]:
        """By formula; above 1 the nodes are slower than the profile says."""
        return {"prefill": self._prefill.factor(now), "decode": self._decode.factor(now)}

    def model(self, now: float) -> LatencyModel:
        """The formulas as the nodes keep them now."""
        prefill, decode = self._prefill.factor(now), self._decode.factor(now)
        a, b, c = (prefill * value for value in self._profile.prefill)
        d, e, f = (decode * value for value in self._profile.decode)
        return LatencyModel((a, b, c), (d, e, f), self._profile.transfer)


def _take(formula: _Formula, before: StepSums, after: StepSums, now: float) -> None:
    steps, seconds = after.steps - before.steps, after.seconds - before.seconds
    first, second = after.tokens - before.tokens, after.weight - before.weight
    if steps > 0 and min(first, second) >= 0:  # else it has begun to count anew
        formula.take((steps, first, second), seconds, now)
