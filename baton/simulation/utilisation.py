"""How busy a load keeps simulated nodes."""

from __future__ import annotations

from baton.simulation.setup import Setup
from baton.simulation.simulate import simulate
from tuner.trace import Trace, scale_rate

_TRIES = 6
_NEAR = 0.03


def at_utilisation(setup: Setup, trace: Trace, share: float) -> tuple[Trace, float]:
    """The trace at the rate at which the busiest node computes `share` of the time.

    Gives what it comes to, too: a short trace hits it only about.
    """
    found, busiest = trace, 0.0
    for _ in range(_TRIES):
        busiest = max(simulate(setup, found).busy.values())
        if abs(busiest / share - 1) < _NEAR:
            break
        found = scale_rate(found, (share / busiest) ** 0.8)  # waiting for the last one is no load
    return found, busiest
