"""The online tuner at work in a simulated fleet: it looks, decides, and moves nodes.

A move is what the router does with a real node: no new work for it, what runs there ends, then it
comes back in its other role as a new incarnation. Beside the tuner there is one who knows the load
beforehand and moves at once: what he reaches is what any tuner could.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from baton.simulation.clock import VirtualClock
from router.fleet import Fleet
from router.moving import standing, to_move
from tuner.goodput import Slo
from tuner.live import LiveModel
from tuner.observed import Observed
from tuner.online import Costs, Limits, Pressure, State, decide
from tuner.record import RequestRecord
from tuner.trace import TracedRequest
from wire.types import NodeId, Role


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the tuner is told, and how long a move takes besides what it waits for."""

    slo: Slo
    limits: Limits = field(default_factory=Limits)
    window_s: float = 30.0
    interval_s: float = 1.0
    switch_s: float = 0.1
    believed: Costs | None = None  # what its profile says, if that is not the truth


@dataclass(frozen=True, slots=True)
class Known:
    """Instead of a tuner: moves that somebody makes who knows what will come, and when."""

    moves: tuple[tuple[float, Role, int], ...]  # at a time, to this role, so many nodes
    switch_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Move:
    """One node that changed its role, and why."""

    at: float
    node: str
    role: Role
    reason: str


class Mover:
    """Takes nodes from one role to the other.

    Args:
        is_idle: whether nothing of a node's work is left.
        change: gives a node, by its id, its new role.
    """

    def __init__(
        self,
        fleet: Fleet,
        clock: VirtualClock,
        switch_s: float,
        *,
        is_idle: Callable[[NodeId], bool],
        change: Callable[[NodeId, Role], None],
    ) -> None:
        self.moves: list[Move] = []
        self.num_moving = 0
        self._fleet = fleet
        self._clock = clock
        self._switch_s = switch_s
        self._is_idle = is_idle
        self._change = change

    def begin(self, grow: Role, count: int, reason: str) -> None:
        """Take the nodes of the other role that have least to do."""
        for chosen in to_move(self._fleet, grow, count):
            self.moves.append(Move(self._clock.now, chosen.id.name, grow, reason))
            self.num_moving += 1
            self._fleet.drain(chosen.id)
            self._when_idle(chosen.id, grow)

    def _when_idle(self, node: NodeId, role: Role) -> None:
        if not self._is_idle(node):
            self._clock.after(self._switch_s, partial(self._when_idle, node, role))
            return
        self.num_moving -= 1
        self._change(node, role)


class SimulatedTuner:
    """Looks, decides and moves. `num_waiting` requests are in the router's queue."""

    def __init__(
        self,
        tuning: Tuning,
        costs: Costs,
        fleet: Fleet,
        clock: VirtualClock,
        mover: Mover,
        num_waiting: Callable[[], int],
    ) -> None:
        self.looks: list[tuple[float, Pressure]] = []
        self._tuning = tuning
        self._costs = tuning.believed or costs
        self._live = LiveModel(self._costs.model)
        self._fleet = fleet
        self._clock = clock
        self._mover = mover
        self._num_waiting = num_waiting
        self._observed = Observed(tuning.window_s, began=0.0)
        self._state = State()
        clock.after(tuning.interval_s, self._look)

    def arrived(self, prompt_tokens: int) -> None:
        self._observed.arrived(self._clock.now, prompt_tokens)

    def ended(self, request: TracedRequest, record: RequestRecord) -> None:
        self._observed.ended(
            self._clock.now,
            request.input_len,
            request.output_len,
            ttft_s=record.ttft,
            tpot_s=record.tpot,
        )

    def _look(self) -> None:
        tuning, now = self._tuning, self._clock.now
        self._clock.after(tuning.interval_s, self._look)
        if self._mover.num_moving:
            return
        for node in self._fleet:
            self._live.report(str(node.id), node.load.prefill_steps, node.load.decode_steps, now)
        costs = replace(self._costs, model=self._live.model(now))
        seen = self._observed.look(now, standing(self._fleet, self._num_waiting()))
        decision, self._state = decide(seen, self._state, now, costs, tuning.slo, tuning.limits)
        if decision.pressure is not None:
            self.looks.append((now, decision.pressure))
        if decision.grow:
            self._mover.begin(Role(decision.grow), decision.count, decision.reason)
