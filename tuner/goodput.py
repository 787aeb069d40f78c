"""Requests that were served well enough: both times hold, for the same request.

A request counts if it completed, its TTFT is within one limit and its TPOT within the other; one
that has no second token has no TPOT to miss. Two separate percentiles would let one half of the
requests miss one limit and the other half the other, and still call 90 % of them good.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuner.record import RequestRecord

RATE_STEP = 1.05  # rates closer than this are not told apart
LOWEST_SHARE = 1 / 32  # of the first rate tried: below, a fleet counts as unable
HIGHEST_FACTOR = 256


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits, in seconds."""

    ttft_s: float
    tpot_s: float

    def __post_init__(self) -> None:
        if not (self.ttft_s > 0 and self.tpot_s > 0):
            raise ValueError("a limit must be above 0")


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of all requests that were sent."""

    good: float  # both limits hold
    ttft: float  # completed, and this one holds
    tpot: float
    completed: float


SloOf = Callable[[RequestRecord], Slo]
"""The limits of one request, where kinds of requests have limits of their own."""


def attainment(records: Sequence[RequestRecord], slo: Slo | SloOf) -> Attainment:
    """All zero for no records."""
    limits = (lambda _: slo) if isinstance(slo, Slo) else slo
    completed = [record for record in records if record.error is None]
    ttft = [_first_output(record) <= limits(record).ttft_s for record in completed]
    tpot = [(record.tpot or 0.0) <= limits(record).tpot_s for record in completed]
    good = sum(a and b for a, b in zip(ttft, tpot, strict=True))
    number = max(1, len(records))
    return Attainment(
        good / number, sum(ttft) / number, sum(tpot) / number, len(completed) / number
    )


def _first_output(record: RequestRecord) -> float:
    """Of an answer without a visible token its client knew only at its end."""
    return record.e2e if record.ttft is None else record.ttft


def highest_rate(holds: Callable[[float], bool], first: float) -> float:
    """The highest rate at which `holds`, to 5 %; 0 if it does at none that is worth a try.

    Doubles or halves from `first` until the answer changes, then bisects. A simulated or measured
    answer need not be monotonic; then this is one of the rates at which it changes.
    """
    low, high = 0.0, first
    if holds(first):
        low = first
        while low < first * HIGHEST_FACTOR and holds(2 * low):
            low *= 2
        high = 2 * low
    else:
        while high > first * LOWEST_SHARE and not low:
            low = high / 2 if holds(high / 2) else 0.0
            high = high if low else high / 2
    while low and high / low > RATE_STEP:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
