"""Moves nodes between prefill and decode while the fleet serves: the decision, and nothing else.

    pressure of a role = nodes that its work needs / nodes that it has

The work is what was observed lately; what it needs follows from the latency model and the limits:

    prefill   each prompt takes s seconds of a node. In a queue with Poisson arrivals and equal
              service the mean wait is u·s / 2(1-u) at utilisation u (Pollaczek and Khinchine), so
              u may be what keeps s + TAIL waits within the limit. If more than that is queued,
              nodes are needed that keep up and work it off within RECOVER_S.
    decode    a step of B requests takes d + B·(e·context + f); B may grow until that is the limit
              of the time per token, or the node's seats or its memory are full, and a node then
              makes B tokens in that time. If more requests decode than that, nodes are
              needed for as many.

What a request takes outside of the engines, no split can change: it comes off the limits first. Of
the time to the first token that is what happens before a node hears of the request, of the time per
token the handoff, shared by the tokens after the first.

The split is looked for that has the least of the greater of both pressures, and as many nodes move
at once as it takes. They move if that lowers the greater pressure by more than a margin, for long
enough, and not too soon after the last move. Both times shrink with what is to be gained, if a
limit is not kept as it is, by the formulas or by the times that requests really took; and they grow
while the wish goes to and fro. What requests took makes a move sooner, and never one that the
formulas do not want: it is known when they have ended, and stays long after a move has helped.
Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, isfinite
from typing import NamedTuple

from tuner.goodput import Slo
from tuner.latency import LatencyModel, StepWork
from tuner.overheads import Overheads

TAIL = 3.0  # so many mean waits must fit: about the 95th percentile of an exponential one
IMPOSSIBLE = 1e6  # nodes: no number of them would do
RECOVER_S = 10.0  # in which a queue should be worked off
MAX_RESTLESS = 2.0  # more turns of the wish make it no more patient
LEAST_SHARE = 0.5  # of a limit that stays for steps: what a probe was disturbed by stops no tuner


@dataclass(frozen=True, slots=True)
class Observation:
    """The last while of a fleet's work."""

    requests_per_s: float
    answers_per_s: float  # that have ended
    prompt_tokens: float  # mean that had to be computed, prefix hits taken off
    prompt_squares: float  # mean of their squares
    output_tokens: float  # mean
    context_tokens: float  # mean while decoding
    num_requests: int
    num_prefill: int  # serving nodes
    num_decode: int
    queued_tokens: int = 0  # of prompts, not computed yet
    num_decoding: int = 0  # requests on decode nodes, with those that wait for a seat there
    num_seats: int = 0  # requests that a node decodes at once, at most; 0: no bound
    kv_tokens: int = 0  # that a node holds; 0: no bound
    ttft_s: float = 0.0  # that one in ten of those that ended exceeded
    tpot_s: float = 0.0

    def missed(self, slo: Slo) -> dict[str, str]:
        """The roles whose limit one request in ten has missed, and by what.

        It tells late: of a change when its requests have ended, of a move when older ones have.
        """
        found = {}
        if self.ttft_s > slo.ttft_s:
            found["prefill"] = f"a TTFT of {1000 * self.ttft_s:.0f} ms"
        if self.tpot_s > slo.tpot_s:
            found["decode"] = f"a TPOT of {1000 * self.tpot_s:.0f} ms"
        return found


@dataclass(frozen=True, slots=True)
class Limits:
    """How willing the tuner is."""

    margin: float = 0.15  # the greater pressure must fall by this share
    calm: float = 0.85  # below this pressure nothing is worth a move
    hold_s: float = 10.0  # so long the same role must want nodes, if a move just pays
    pause_s: float = 30.0  # after a move, if the next one just pays
    min_requests: int = 10  # fewer say nothing

    def patience(self, gain: float, restless: float, *, urgent: bool) -> float:
        """What to multiply both times with.

        Args:
            gain: the share by which the greater pressure would fall.
            restless: turns of the wish lately; the first one is none.
            urgent: a limit is not kept, by the formulas or by what was measured.
        """
        eager = (self.margin / gain) ** 2 if urgent else 1.0
        return eager * float(16.0 ** min(max(0.0, restless - 1.0), MAX_RESTLESS))


@dataclass(frozen=True, slots=True)
class Pressure:
    """Of 1 and less a role keeps its limit."""

    prefill: float
    decode: float

    @property
    def worst(self) -> float:
        return max(self.prefill, self.decode)

    def __str__(self) -> str:
        return f"prefill {self.prefill:.2f}, decode {self.decode:.2f}"


@dataclass(frozen=True, slots=True)
class State:
    """What one decision hands to the next."""

    wanted: str = ""  # the role that should grow
    wanted_since: float = 0.0
    last_wanted: str = ""  # of the two roles, whatever came between
    moved_at: float = float("-inf")
    restless: float = 0.0  # turns from one role to the other, old ones forgotten
    turned_at: float = 0.0

    def wanting(self, role: str, now: float, forget_s: float) -> State:
        """The wish now; empty: there is none."""
        if role == self.wanted:
            return self
        state = replace(self, wanted=role, wanted_since=now, last_wanted=role or self.last_wanted)
        if not role or self.last_wanted in ("", role):
            return state
        kept = self.restless * exp((self.turned_at - now) / forget_s) if forget_s else 0.0
        return replace(state, restless=kept + 1.0, turned_at=now)


@dataclass(frozen=True, slots=True)
class Decision:
    """`grow` names the role that gets `count` nodes of the other; empty: leave all as it is."""

    grow: str
    reason: str
    pressure: Pressure | None = None
    count: int = 0


@dataclass(frozen=True, slots=True)
class Costs:
    """What work takes: steps by the formulas, and each request besides, wherever it is served."""

    model: LatencyModel
    front_s: float = 0.0  # before a node hears of it
    handoff_s: float = 0.0  # from the first token to the first step on the decode node

    @classmethod
    def of(cls, model: LatencyModel, overheads: Overheads) -> Costs:
        """`model` as it is in the fleet: what steps take in excess is in it already."""
        return cls(model, overheads.front_s, overheads.handoff_s)

    def left_of(self, slo: Slo, output_tokens: float) -> Slo:
        """The limits without what no step takes."""
        per_token = self.handoff_s / max(1.0, output_tokens - 1)
        return Slo(
            max(slo.ttft_s - self.front_s, LEAST_SHARE * slo.ttft_s),
            max(slo.tpot_s - per_token, LEAST_SHARE * slo.tpot_s),
        )


def pressure(seen: Observation, costs: Costs, slo: Slo) -> Pressure:
    """Nodes that the observed work needs, per node that is there."""
    left = costs.left_of(slo, seen.output_tokens)
    return Pressure(
        _prefill_nodes(seen, costs.model, left.ttft_s) / _have(seen.num_prefill),
        _decode_nodes(seen, costs.model, left.tpot_s) / _have(seen.num_decode),
    )


def _have(num_nodes: int) -> float:
    """A role that has lost its last node presses as if half a one were left."""
    return num_nodes or 0.5


def _prefill_nodes(seen: Observation, model: LatencyModel, ttft_s: float) -> float:
    a, b, c = model.prefill
    service_s = a + b * seen.prompt_tokens + c * seen.prompt_squares
    if service_s <= 0:  # all of it comes from the cache, or a profile says that it takes no time
        return 0.0
    waits = (ttft_s - service_s) / (TAIL * service_s / 2)  # u / (1 - u) may be so much
    if waits <= 0:
        return IMPOSSIBLE
    busy = seen.requests_per_s * service_s
    queued_s = service_s * seen.queued_tokens / max(1.0, seen.prompt_tokens)
    return max(busy * (1 + 1 / waits), busy + queued_s / RECOVER_S)


def _decode_nodes(seen: Observation, model: LatencyModel, tpot_s: float) -> float:
    work = StepWork(decode_batch=1, decode_context=round(seen.context_tokens))
    empty_s = model.decode[0]
    request_s = model.step_s(work) - empty_s
    if tpot_s <= empty_s + request_s:
        return IMPOSSIBLE
    in_time = (tpot_s - empty_s) / request_s if request_s > 0 else float("inf")
    most = min(in_time, _room(seen))  # per node
    tokens_per_s = seen.answers_per_s * seen.output_tokens
    busy = tokens_per_s * (empty_s / most + request_s)  # each in a step of so many
    return max(busy, seen.num_decoding / most)


def _room(seen: Observation) -> float:
    """Requests that a node has seats and memory for: one gets what it may come to hold."""
    held = seen.context_tokens + seen.output_tokens / 2
    seats = float(seen.num_seats) or float("inf")
    memory = seen.kv_tokens / max(1.0, held) if seen.kv_tokens else float("inf")
    return max(1.0, min(seats, memory))


def decide(
    seen: Observation, state: State, now: float, costs: Costs, slo: Slo, limits: Limits
) -> tuple[Decision, State]:
    """Whether to move nodes now, and why (not); the state for the next time."""
    if seen.num_requests < limits.min_requests:
        reason = f"{seen.num_requests} requests lately are too few to judge by"
        return Decision("", reason), state.wanting("", now, limits.pause_s)
    at_present = pressure(seen, costs, slo)
    missed = seen.missed(slo)
    better, after, reason = _better_split(seen, at_present, limits)
    state = state.wanting(better.grow, now, limits.pause_s)
    if not better.grow:
        if missed and at_present.worst <= 1:  # the formulas find nothing wrong, and users do
            reason = f"{reason}; yet one request in ten had {' or '.join(missed.values())} or more"
        return Decision("", reason, at_present), state
    gain = 1 - after.worst / at_present.worst
    urgent = at_present.worst > 1 or better.grow in missed
    patience = limits.patience(gain, state.restless, urgent=urgent)
    if now - state.moved_at < patience * limits.pause_s:
        return Decision("", f"{reason}, but nodes have just moved", at_present), state
    if now - state.wanted_since < patience * limits.hold_s:
        return Decision("", f"{reason}, if that stays so", at_present), state
    moved = replace(state, wanted="", moved_at=now)
    return Decision(better.grow, reason, at_present, better.num_nodes), moved


class _Move(NamedTuple):
    grow: str
    num_nodes: int


_STAY = _Move("", 0)


def _better_split(
    seen: Observation, at_present: Pressure, limits: Limits
) -> tuple[_Move, Pressure, str]:
    """What to move, the pressure after that, and the sentence that says why."""
    num_nodes = seen.num_prefill + seen.num_decode
    if not isfinite(at_present.worst):
        return _STAY, at_present, f"that makes no sense: {at_present}"
    if at_present.worst * num_nodes >= IMPOSSIBLE:
        return _STAY, at_present, "a limit is below what a request alone takes: no split keeps it"
    if at_present.worst < limits.calm:
        return _STAY, at_present, f"there is room: {at_present}"
    grow = "prefill" if at_present.prefill >= at_present.decode else "decode"
    donors = seen.num_decode if grow == "prefill" else seen.num_prefill
    if donors < 2:
        return _STAY, at_present, f"each role keeps its last node: {at_present}"
    count, after = _fewest(at_present, seen, grow, donors, limits)
    nodes = "a node" if count == 1 else f"{count} nodes"
    if after.worst > at_present.worst * (1 - limits.margin):
        reason = f"{nodes} more for {grow} would not help enough: {at_present}, then {after}"
        return _STAY, after, reason
    return _Move(grow, count), after, f"{grow} needs {nodes}: {at_present}, then {after}"


def _fewest(
    at_present: Pressure, seen: Observation, grow: str, donors: int, limits: Limits
) -> tuple[int, Pressure]:
    """The fewest nodes that bring calm, or, where none do, the number that is best."""
    sign = 1 if grow == "prefill" else -1
    found = []
    for count in range(1, donors):
        prefill, decode = seen.num_prefill + sign * count, seen.num_decode - sign * count
        after = Pressure(
            at_present.prefill * _have(seen.num_prefill) / prefill,
            at_present.decode * _have(seen.num_decode) / decode,
        )
        if after.worst < limits.calm:
            return count, after
        found.append((count, after))
    return min(found, key=lambda one: (one[1].worst, one[0]))
