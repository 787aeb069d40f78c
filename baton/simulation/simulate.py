"""Runs a trace on a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass

from baton.simulation.colocated_run import ColocatedRun
from baton.simulation.fleet_run import FleetRun
from baton.simulation.setup import Setup
from baton.simulation.tuned import Move
from tuner.online import Pressure
from tuner.record import RequestRecord
from tuner.trace import Trace


@dataclass(frozen=True, slots=True)
class Simulated:
    """What came of a run."""

    records: list[RequestRecord]
    duration_s: float  # of virtual time
    busy: dict[str, float]  # by node: the share of time in which it computed
    moves: tuple[Move, ...] = ()  # of nodes, where somebody moves them
    looks: tuple[tuple[float, Pressure], ...] = ()  # of the tuner: when, and what it saw


def simulate(setup: Setup, trace: Trace) -> Simulated:
    """Raises ValueError where failures are asked of a colocated fleet, which has no retries."""
    if setup.split.mixed:
        if setup.failures or setup.tuning is not None:
            raise ValueError("failures and tuning are simulated with prefill and decode nodes only")
        together = ColocatedRun(setup, trace)
        records = together.run()
        engines = together.nodes
        now = together.clock.now
        moves: tuple[Move, ...] = ()
        looks: tuple[tuple[float, Pressure], ...] = ()
    else:
        apart = FleetRun(setup, trace)
        records = apart.run()
        engines = {id: node.engine for id, node in apart.nodes.items()}
        now = apart.clock.now
        moves = () if apart.mover is None else tuple(apart.mover.moves)
        looks = () if apart.tuner is None else tuple(apart.tuner.looks)
    busy: dict[str, float] = {}
    for id, engine in engines.items():  # all lives of a node together
        busy[id.name] = busy.get(id.name, 0.0) + engine.busy_s
    shares = {name: s / now if now else 0.0 for name, s in busy.items()}
    return Simulated(records, now, shares, moves, looks)
