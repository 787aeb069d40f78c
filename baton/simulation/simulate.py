"""Runs a trace on a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass

from baton.simulation.colocated_run import ColocatedRun
from baton.simulation.fleet_run import FleetRun
from baton.simulation.setup import Setup
from tuner.record import RequestRecord
from tuner.trace import Trace


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a run."""

    records: list[RequestRecord]
    duration_s: float  # of virtual time
    busy: dict[str, float]  # by node: the share of time in which it computed


def simulate(setup: Setup, trace: Trace) -> Simulated:
    """Raises ValueError where failures are asked of a colocated fleet, which has no retries."""
    if setup.split.mixed:
        if setup.failures:
            raise ValueError("failures are simulated with prefill and decode nodes only")
        together = ColocatedRun(setup, trace)
        records = together.run()
        busy = {id.name: engine.busy_s for id, engine in together.nodes.items()}
        now = together.clock.now
    else:
        apart = FleetRun(setup, trace)
        records = apart.run()
        busy = {id.name: node.engine.busy_s for id, node in apart.nodes.items()}
        now = apart.clock.now
    return Simulated(records, now, {name: s / now if now else 0.0 for name, s in busy.items()})
