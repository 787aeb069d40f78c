"""Runs a trace on a simulated fleet."""

from __future__ import annotations

from dataclasses import dataclass

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
    """Raises ValueError where mixed nodes are to be tuned, which have no role to change."""
    if setup.split.mixed and setup.tuning is not None:
        raise ValueError("tuning is simulated with prefill and decode nodes only")
    run = FleetRun(setup, trace)
    records = run.run()
    now = run.clock.now
    busy: dict[str, float] = {}
    for id, node in run.nodes.items():  # all lives of a node together
        busy[id.name] = busy.get(id.name, 0.0) + node.engine.busy_s
    shares = {name: s / now if now else 0.0 for name, s in busy.items()}
    moves = () if run.mover is None else tuple(run.mover.moves)
    looks = () if run.tuner is None else tuple(run.tuner.looks)
    return Simulated(records, now, shares, moves, looks)
