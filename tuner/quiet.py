"""What a machine takes when nobody disturbs it, from repeated measurements, and how far they vary.

Whatever else runs on a machine or its host only adds time. So of repeats the lower quartile is
taken: nearly the least, and no single lucky one. How far the middle half of them is apart tells
whether the machine was quiet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from tuner.report import percentile

NOISY = 0.10  # figures that vary by more are told not to be trusted
FEWEST = 3  # repeats that tell a spread


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower quartile. Raises ValueError where there is none."""
    ordered = sorted(seconds)
    if not ordered:
        raise ValueError("nothing was measured")
    return percentile(ordered, 0.25)


def spread_of(cases: Iterable[Sequence[float]]) -> float:
    """How far the middle half of a case's repeats is apart, relative; the median of all cases."""
    spreads = []
    for repeats in cases:
        ordered = sorted(repeats)
        if len(ordered) >= FEWEST and ordered[0] > 0:
            low, middle, high = (percentile(ordered, share) for share in (0.25, 0.5, 0.75))
            spreads.append((high - low) / middle)
    return median(spreads) if spreads else 0.0


def noisy_line(spreads: dict[str, float]) -> str:
    """What to tell whoever measured on a machine that was not quiet; empty if it was."""
    worst = max(spreads.values(), default=0.0)
    if worst <= NOISY:
        return ""
    told = ", ".join(f"{name} {spread:.0%}" for name, spread in spreads.items())
    return f"the figures vary by {worst:.0%} ({told}): profile again on a quiet machine"
