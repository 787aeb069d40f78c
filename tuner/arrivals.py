"""When requests are sent: five arrival processes, each a function of its seed.

    fixed     one every 1/rate seconds
    poisson   independent of each other: exponential gaps
    gamma     gaps of the same mean with squared variation 1/burstiness: below 1 they come in clumps
    onoff     Poisson in the first part of every period, nothing in the rest
    diurnal   Poisson whose rate follows a sine over the period

The mean rate over whole periods is the given one for each of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count


class Arrival(StrEnum):
    """How the times between requests are distributed when a rate is given."""

    FIXED = "fixed"
    POISSON = "poisson"
    GAMMA = "gamma"
    ONOFF = "onoff"
    DIURNAL = "diurnal"


@dataclass(frozen=True, slots=True)
class ArrivalShape:
    """What the uneven processes need beside a rate; each reads only its own."""

    burstiness: float = 0.5  # gamma's shape parameter, as vLLM's bench names it; 1 is Poisson
    period_s: float = 60.0  # onoff, diurnal
    on_share: float = 0.5  # onoff: of each period
    swing: float = 0.8  # diurnal: the rate goes from (1 - swing) to (1 + swing) times the mean

    def __post_init__(self) -> None:
        if not self.burstiness > 0:
            raise ValueError(f"burstiness must be above 0, not {self.burstiness:g}")
        if not self.period_s > 0:
            raise ValueError(f"the period must be above 0 s, not {self.period_s:g}")
        if not 0 < self.on_share <= 1:
            raise ValueError(f"the share that is on must be above 0, up to 1: {self.on_share:g}")
        if not 0 <= self.swing <= 1:
            raise ValueError(f"the swing must be from 0 to 1, not {self.swing:g}")


PLAIN_SHAPE = ArrivalShape()


def arrival_offsets(
    rate: float, arrival: Arrival, seed: int, shape: ArrivalShape = PLAIN_SHAPE
) -> Iterator[float]:
    """Seconds from the start of the run at which to send requests 0, 1, 2, …; endless."""
    rng = random.Random(f"{seed}/arrivals")
    match arrival:
        case Arrival.FIXED:
            return (index / rate for index in count())
        case Arrival.POISSON:
            return _poisson(rate, rng)
        case Arrival.GAMMA:
            return _gamma(rate, shape.burstiness, rng)
        case Arrival.ONOFF:
            return _onoff(rate, shape, rng)
        case Arrival.DIURNAL:
            return _diurnal(rate, shape, rng)


def _poisson(rate: float, rng: random.Random) -> Iterator[float]:
    offset = 0.0
    while True:
        yield offset
        offset += rng.expovariate(rate)


def _gamma(rate: float, burstiness: float, rng: random.Random) -> Iterator[float]:
    offset = 0.0
    while True:
        yield offset
        offset += rng.gammavariate(burstiness, 1 / (rate * burstiness))


def _onoff(rate: float, shape: ArrivalShape, rng: random.Random) -> Iterator[float]:
    """A Poisson process in a time that stands still while the load is off."""
    on_s = shape.period_s * shape.on_share
    for running in _poisson(rate / shape.on_share, rng):
        periods, within = divmod(running, on_s)
        yield periods * shape.period_s + within


def _diurnal(rate: float, shape: ArrivalShape, rng: random.Random) -> Iterator[float]:
    """Thinning (Lewis and Shedler, 1979): candidates at the highest rate, kept as the sine says."""
    peak = rate * (1 + shape.swing)
    for offset in _poisson(peak, rng):
        now = rate * (1 + shape.swing * math.sin(2 * math.pi * offset / shape.period_s))
        if rng.random() * peak < now:
            yield offset
