"""The online tuner in a router: looks at the fleet, decides (`tuner.online`), and moves nodes.

    off       nothing
    dry-run   every decision is logged, counted and shown on /debug/fleet; no node is asked
    on        the nodes of the other role that have least to do are asked to change

Of several workers the first one decides, by the requests that came to itself, times their number.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from router.control import Control
from router.metrics import RouterMetrics
from router.moving import standing, to_move
from router.role_switch import State as SwitchState
from router.role_switch import SwitchImpossible
from tuner.goodput import Slo
from tuner.live import LiveModel
from tuner.observed import Observed
from tuner.online import Costs, Decision, Limits, Observation, State, decide
from tuner.profile import Profile
from wire.types import Role

log = logging.getLogger(__name__)

PATIENT = Limits()
INTERVAL_S = 1.0
WINDOW_S = 30.0
REST_S = 60.0  # a node that could not change its role is asked no sooner again
_REMEMBERED = 50  # decisions that moved a node, or would have


@dataclass(frozen=True, slots=True)
class Moved:
    """A decision to move a node, and what came of it."""

    at: float
    node: str
    role: str
    reason: str
    outcome: str  # "dry-run", "asked", or why it could not be asked


class FleetTuner:
    """Args:
    num_workers: routers that share the requests.
    clock: monotonic seconds.
    """

    def __init__(
        self,
        profile: Profile,
        slo: Slo,
        control: Control,
        metrics: RouterMetrics,
        clock: Callable[[], float],
        *,
        dry_run: bool,
        num_workers: int = 1,
        limits: Limits = PATIENT,
    ) -> None:
        self.observed = Observed(WINDOW_S, clock())
        self.moved: deque[Moved] = deque(maxlen=_REMEMBERED)
        self._last: Decision | None = None
        self._seen: Observation | None = None
        self._state = State()
        self._live = LiveModel(profile.overheads.applied(profile.latency))
        self._profile, self._slo, self._limits = profile, slo, limits
        self._control, self._metrics, self._clock = control, metrics, clock
        self._dry_run, self._num_workers = dry_run, num_workers
        self._warned = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, in the running event loop."""
        self._task = asyncio.create_task(self._look_for_ever())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look_for_ever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                self.look()
            except Exception:  # the requests go on, and so does the next look
                log.exception("the tuner failed")

    def look(self) -> None:
        """One look at the fleet, and what follows from it."""
        if not self._profile_fits():
            return
        if any(switch.state in _GOING for switch in self._control.switches.all()):
            return
        now = self._clock()
        for node in self._control.fleet:
            self._live.report(str(node.id), node.load.prefill_steps, node.load.decode_steps, now)
        waiting = self._control.requests.num_waiting * self._num_workers
        seen = self.observed.look(now, standing(self._control.fleet, waiting))
        self._seen = replace(
            seen,
            requests_per_s=seen.requests_per_s * self._num_workers,
            answers_per_s=seen.answers_per_s * self._num_workers,
            num_requests=seen.num_requests * self._num_workers,
        )
        costs = Costs.of(self._live.model(now), self._profile.overheads)
        decision, self._state = decide(self._seen, self._state, now, costs, self._slo, self._limits)
        self._last = decision
        self._metrics.tuned(decision)
        if decision.grow:
            role, resting = Role(decision.grow), self._resting(now)
            for node in to_move(self._control.fleet, role, decision.count, resting):
                self._move(node.id.name, role, decision.reason, now)

    def _resting(self, now: float) -> set[str]:
        """Nodes that have failed to move lately: another one may be able to."""
        ended = [s for s in self._control.switches.all() if s.state is SwitchState.FAILED]
        return {s.node.name for s in ended if s.ended is not None and now - s.ended < REST_S}

    def _profile_fits(self) -> bool:
        """Whether the fleet serves the model that was profiled; if not, that is said once."""
        model = self._control.fleet.model
        if model is None:
            return False
        fits = model.fingerprint == self._profile.model_fingerprint
        if not fits and not self._warned:
            self._warned = True
            log.error(
                "the tuner does nothing: its profile is of %s (%s), the fleet serves %s (%s); "
                "make one with `baton profile`",
                self._profile.model_name,
                self._profile.model_fingerprint,
                model.name,
                model.fingerprint,
            )
        return fits

    def _move(self, node: str, role: Role, reason: str, now: float) -> None:
        outcome = "dry-run" if self._dry_run else self._ask(node, role, now)
        log.info("tuner: %s to %s (%s): %s", node, role.value, outcome, reason)
        self.moved.append(Moved(now, node, role.value, reason, outcome))

    def _ask(self, node: str, role: Role, now: float) -> str:
        try:
            self._control.switches.begin(node, role, now)
        except SwitchImpossible as error:
            return str(error)
        return "asked"

    def as_json(self) -> dict[str, Any]:
        """What it sees, what it made of that last, and what it has moved, the latest last."""
        now = self._clock()
        return {
            "mode": "dry-run" if self._dry_run else "on",
            "observed": None if self._seen is None else asdict(self._seen),
            "pressure": None
            if self._last is None or self._last.pressure is None
            else asdict(self._last.pressure),
            "slower_than_profile": self._live.factors(now),
            "decision": "" if self._last is None else self._last.reason,
            "moves": [
                {"ago_s": round(now - moved.at, 3), **_without_time(moved)} for moved in self.moved
            ],
        }


_GOING = (SwitchState.DRAINING, SwitchState.RETURNING)


def _without_time(moved: Moved) -> dict[str, Any]:
    told = asdict(moved)
    del told["at"]
    return told
