"""Keeps a latency model true to the machines that serve: a factor per coefficient. Pure.

A node counts its steps of either kind: how many, the variables of the formula summed up, and the
seconds that they took. The formulas are linear, so what they say of all steps between two counts is
what they say of the sums.

    Σ seconds · (measured - Σ factor · what that coefficient says)² / measured²   is to be least,
    and NEAR · Σ (factor - 1)², in the same measure, with it

The second term leaves alone what the load does not tell: while few requests decode, a profile that
is wrong is corrected in its constant, which is most of such a step, and what a further request
costs stays as it was profiled until there are more. One factor for all of a formula was wrong by
what its constant had been. As errors are relative to what was measured, steps that somebody
disturbed count little. It is forgotten after a while, and stays within bounds: who is four times as
slow as its profile has another profile's.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np

from tuner.latency import LatencyModel, Vector
from wire.types import StepSums

MEMORY = 256  # samples, and
MEMORY_S = 120.0  # none older than that
PROFILE_S = 2.0  # so many seconds of steps must say otherwise before the profile is doubted
LEAST_S = 0.005  # of steps make a sample
NEAR = 0.03  # seconds of steps that weigh as much as the profile's own word
BOUND = 4.0
SWEEPS = 20
MAX_NODES = 4096

Coefficients = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    seconds: float
    parts: Coefficients  # of those seconds, by coefficient of the profile


@dataclass(slots=True)
class _Formula:
    """One of a profile's formulas, and what was seen of it lately."""

    coefficients: Coefficients
    samples: deque[_Sample] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def take(self, variables: Coefficients, seconds: float, now: float) -> None:
        a, b, c = (k * x for k, x in zip(self.coefficients, variables, strict=True))
        if a + b + c > 0 and LEAST_S <= seconds < float("inf"):
            self.samples.append(_Sample(now, seconds, (a, b, c)))

    def now(self, now: float) -> tuple[Coefficients, float]:
        """The coefficients, and how many times as long steps take as the profile says."""
        while self.samples and self.samples[0].at < now - MEMORY_S:
            self.samples.popleft()
        parts = np.array([one.parts for one in self.samples]).reshape(-1, 3)
        if parts.sum() < PROFILE_S:
            return self.coefficients, 1.0
        seconds = np.array([one.seconds for one in self.samples])
        factors = nearest(parts / seconds[:, None], parts.sum(axis=1))
        a, b, c = (float(f * k) for f, k in zip(factors, self.coefficients, strict=True))
        return (a, b, c), float((parts @ factors).sum() / parts.sum())


def nearest(shares: Vector, weights: Vector) -> Vector:
    """Factors within bounds, near 1, that bring each row's sum to 1."""
    near = NEAR * float(weights @ shares.sum(axis=1) ** 2 / weights.sum())
    square = (shares * weights[:, None]).T @ shares + near * np.eye(3)
    right = shares.T @ weights + near
    factors: Vector = np.clip(np.linalg.solve(square, right), 1 / BOUND, BOUND)
    for _ in range(SWEEPS):  # where a bound holds one of them, the others make up for it
        for i in range(3):
            others = square[i] @ factors - square[i, i] * factors[i]
            factors[i] = min(max((right[i] - others) / square[i, i], 1 / BOUND), BOUND)
    return factors


class LiveModel:
    """A profile's model with coefficients that follow its nodes."""

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
        return {"prefill": self._prefill.now(now)[1], "decode": self._decode.now(now)[1]}

    def model(self, now: float) -> LatencyModel:
        """The formulas as the nodes keep them now."""
        prefill, decode = self._prefill.now(now)[0], self._decode.now(now)[0]
        return LatencyModel(prefill, decode, self._profile.transfer)


def _take(formula: _Formula, before: StepSums, after: StepSums, now: float) -> None:
    steps, seconds = after.steps - before.steps, after.seconds - before.seconds
    first, second = after.tokens - before.tokens, after.weight - before.weight
    if steps > 0 and min(first, second) >= 0:  # else it has begun to count anew
        formula.take((steps, first, second), seconds, now)
