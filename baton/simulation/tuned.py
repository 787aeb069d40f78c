"""The online tuner at work in a simulated fleet: it looks, decides, and moves nodes.

A move is what the router does with a real node: no new work for it, what runs there ends, then it
comes back in its other role as a new incarnation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from baton.simulation.clock import VirtualClock
from router.fleet import Fleet, Node
from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.observed import Observed
from tuner.online import Limits, State, decide
from wire.types import NodeId, Role


@dataclass(frozen=True, slots=True)
class Tuning:
    """What the tuner is told, and how long a move takes besides what it waits for."""

    slo: Slo
    limits: Limits = field(default_factory=Limits)
    window_s: float = 30.0
    interval_s: float = 1.0
    switch_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Move:
    """One node that changed its role, and why."""

    at: float
    node: str
    role: Role
    reason: str


class SimulatedTuner:
    """Args:
    is_idle: whether nothing of a node's work is left.
    change: gives a node, by its id, its new role.
    """

    def __init__(
        self,
        tuning: Tuning,
        model: LatencyModel,
        fleet: Fleet,
        clock: VirtualClock,
        *,
        is_idle: Callable[[NodeId], bool],
        change: Callable[[NodeId, Role], None],
    ) -> None:
        self.moves: list[Move] = []
        self._tuning = tuning
        self._model = model
        self._fleet = fleet
        self._clock = clock
        self._is_idle = is_idle
        self._change = change
        self._observed = Observed(tuning.window_s, began=0.0)
        self._state = State()
        self._moving = False
        clock.after(tuning.interval_s, self._look)

    def arrived(self, prompt_tokens: int) -> None:
        self._observed.arrived(self._clock.now, prompt_tokens)

    def ended(self, prompt_tokens: int, output_tokens: int) -> None:
        self._observed.ended(self._clock.now, prompt_tokens, output_tokens)

    def _look(self) -> None:
        self._clock.after(self._tuning.interval_s, self._look)
        if self._moving:
            return
        now, fleet = self._clock.now, self._fleet
        counts = (fleet.num_serving(Role.PREFILL), fleet.num_serving(Role.DECODE))
        seen = self._observed.look(now, *counts)
        tuning = self._tuning
        decision, self._state = decide(
            seen, self._state, now, self._model, tuning.slo, tuning.limits
        )
        if decision.grow:
            self._begin(Role(decision.grow), decision.reason)

    def _begin(self, role: Role, reason: str) -> None:
        """Take the node of the other role that has least to do."""
        others = [node for node in self._fleet if node.info.role is not role and node.serves]
        chosen = min(others, key=_work)
        self.moves.append(Move(self._clock.now, chosen.id.name, role, reason))
        self._moving = True
        self._fleet.drain(chosen.id)
        self._when_idle(chosen.id, role)

    def _when_idle(self, node: NodeId, role: Role) -> None:
        if not self._is_idle(node):
            self._clock.after(self._tuning.switch_s, partial(self._when_idle, node, role))
            return
        self._moving = False
        self._change(node, role)


def _work(node: Node) -> tuple[int, str]:
    return node.load.queued_tokens + node.load.num_running, node.id.name
