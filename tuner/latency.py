"""What a forward pass and a transfer take: three short formulas, fitted to measurements.

    prefill    a + b·Σn + c·Σ(end² - start²)     over chunks that compute tokens [start, end)
    decode     a + b·Σcontext + c·batch
    transfer   a + b·bytes

A prompt of n tokens from the beginning adds n²; one whose first tokens come from the prefix cache
adds less, so the cached prefix is a variable. A step that does both costs the larger constant and
all the rest: the weights are read once. The form is DistServe's (OSDI '24, section 4), and so is
the fit: least squares of the relative error, so that short steps count as much as long ones.

All coefficients are at least 0: nothing gets faster with more work, however noisy the samples are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
REFITS = 8
NORMAL = 1.4826  # a normal distribution's standard deviation is so many median errors
NEAR = 1.5  # standard deviations within which samples count alike


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one forward pass computes, as far as its time depends on it."""

    prefill_tokens: int = 0
    prefill_squares: int = 0  # Σ(end² - start²)
    decode_batch: int = 0
    decode_context: int = 0  # tokens whose KV the decoding requests read


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement: the formula's variables, 1 first, and the seconds that it took."""

    variables: tuple[float, ...]
    seconds: float


def prefill_sample(work: StepWork, seconds: float) -> Sample:
    return Sample((1.0, work.prefill_tokens, work.prefill_squares), seconds)


def decode_sample(work: StepWork, seconds: float) -> Sample:
    return Sample((1.0, work.decode_context, work.decode_batch), seconds)


def transfer_sample(num_bytes: int, seconds: float) -> Sample:
    return Sample((1.0, num_bytes), seconds)


@dataclass(slots=True)
class Fit:
    """Least squares on relative error, kept as normal equations, so that samples can be forgotten.

    With `memory` the weight of a sample falls to 1/e after so many later ones.
    """

    size: int  # number of coefficients
    memory: float = float("inf")
    num_samples: int = 0
    _square: Vector = field(init=False)  # Σ w x xᵀ / t²
    _right: Vector = field(init=False)  # Σ w x / t
    _weight: float = 0.0

    def __post_init__(self) -> None:
        self._square = np.zeros((self.size, self.size))
        self._right = np.zeros(self.size)

    def add(self, sample: Sample, weight: float = 1.0) -> None:
        """Take one measurement; a time of 0 or less says nothing and is not taken."""
        if sample.seconds <= 0:
            return
        row = np.asarray(sample.variables, dtype=np.float64) / sample.seconds
        keep = float(np.exp(-1 / self.memory))
        self._square = keep * self._square + weight * np.outer(row, row)
        self._right = keep * self._right + weight * row
        self._weight = keep * self._weight + weight
        self.num_samples += 1

    def solve(self) -> tuple[float, ...]:
        """The coefficients, none below 0: the best of all ways to hold some of them at 0.

        Raises:
            ValueError: there is no sample.
        """
        if not self.num_samples:
            raise ValueError("no measurement to fit")
        subsets = (s for n in range(1, self.size + 1) for s in combinations(range(self.size), n))
        best = min((self._on(subset) for subset in subsets), key=lambda found: found[0])
        return tuple(map(float, best[1]))

    def _on(self, subset: tuple[int, ...]) -> tuple[float, Vector]:
        """Mean squared relative error and coefficients with all others at 0."""
        index = np.asarray(subset)
        square = self._square[np.ix_(index, index)]
        scale = np.sqrt(np.maximum(np.diag(square), 1e-300))  # variables differ by many decades
        part = np.linalg.lstsq(square / np.outer(scale, scale), self._right[index] / scale)[0]
        found = np.zeros(self.size)
        found[index] = part / scale
        if (found < 0).any():
            return float("inf"), found
        error = found @ self._square @ found - 2 * found @ self._right + self._weight
        return float(error / self._weight), found


def fit(samples: Iterable[Sample], size: int) -> tuple[float, ...]:
    """Coefficients for samples that count alike, but those that are far off the others' formula.

    Such a sample's weight falls with its distance (Huber, Ann. Math. Statist. 35, 1964): a machine
    that was disturbed for a while does not bend the formula.
    """
    taken = [sample for sample in samples if sample.seconds > 0]
    found = _weighted(taken, [1.0] * len(taken), size)
    for _ in range(REFITS):
        errors = relative_errors(found, taken)
        near = NEAR * NORMAL * median(errors)
        weights = [1.0 if error <= near else near / error for error in errors]
        found = _weighted(taken, weights, size)
    return found


def _weighted(samples: list[Sample], weights: list[float], size: int) -> tuple[float, ...]:
    found = Fit(size)
    for sample, weight in zip(samples, weights, strict=True):
        found.add(sample, weight)
    return found.solve()


def predict(coefficients: Sequence[float], variables: Sequence[float]) -> float:
    return sum(c * x for c, x in zip(coefficients, variables, strict=True))


def relative_errors(coefficients: Sequence[float], samples: Iterable[Sample]) -> list[float]:
    """|predicted - measured| / measured of each sample."""
    return [abs(predict(coefficients, s.variables) / s.seconds - 1) for s in samples]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Seconds of steps and transfers on one kind of node."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    transfer: tuple[float, float]

    def step_s(self, work: StepWork) -> float:
        """One forward pass."""
        a, b, c = self.prefill
        d, e, f = self.decode
        prefill = b * work.prefill_tokens + c * work.prefill_squares
        decode = e * work.decode_context + f * work.decode_batch
        if not work.decode_batch:
            return a + prefill
        if not work.prefill_tokens:
            return d + decode
        return max(a, d) + prefill + decode

    def decode_steps_s(self, num_steps: int, batch: int, context: int) -> float:
        """So many steps that only decode, the first of which reads `context` tokens."""
        a, b, c = self.decode
        grown = context * num_steps + batch * (num_steps * (num_steps - 1) // 2)
        return num_steps * (a + c * batch) + b * grown

    def transfer_s(self, num_bytes: int) -> float:
        return self.transfer[0] + self.transfer[1] * num_bytes
