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
    found, busiest = trace, _busiest(setup, trace)
    for _ in range(_TRIES):
        if not busiest or abs(busiest / share - 1) < _NEAR:
            break
        found = scale_rate(found, (share / busiest) ** 0.8)  # waiting for the last one is no load
        busiest = _busiest(setup, found)
    return found, busiest


def _busiest(setup: Setup, trace: Trace) -> float:
    return max(simulate(setup, trace).busy.values())
