"""Moves nodes between prefill and decode while the fleet serves: the decision, and nothing else.

    pressure of a role = nodes that its work needs / nodes that it has

The work is what was observed lately; what it needs follows from the latency model and the limits:

    prefill   each prompt takes s seconds of a node. In a queue with Poisson arrivals and equal
              service the mean wait is u·s / 2(1-u) at utilisation u (Pollaczek and Khinchine), so
              u may be what keeps s + TAIL waits within the limit.
    decode    a step of B requests takes d + B·(e·context + f); B may grow until that is the limit
              of the time per token, and a node then makes B / limit tokens per second.

One node is moved at a time, to the role under the greater pressure, if that lowers the greater of
both by more than a margin, for long enough, and not too soon after the last move. The margin and
the two times are what keeps a fleet from going to and fro. Pure: time is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuner.goodput import Slo
from tuner.latency import LatencyModel, StepWork

TAIL = 3.0  # so many mean waits must fit: about the 95th percentile of an exponential one
IMPOSSIBLE = 1e6  # nodes: no number of them would do


@dataclass(frozen=True, slots=True)
class Observation:
    """The last while of a fleet's work."""

    requests_per_s: float
    prompt_tokens: float  # mean that had to be computed, prefix hits taken off
    prompt_squares: float  # mean of their squares
    output_tokens: float  # mean
    context_tokens: float  # mean while decoding
    num_requests: int
    num_prefill: int  # serving nodes
    num_decode: int


@dataclass(frozen=True, slots=True)
class Limits:
    """How willing the tuner is."""

    margin: float = 0.15  # the greater pressure must fall by this share
    calm: float = 0.85  # below this pressure nothing is worth a move
    hold_s: float = 10.0  # so long the same move must be wanted
    pause_s: float = 30.0  # after a move
    min_requests: int = 10  # fewer say nothing


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
    moved_at: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Decision:
    """`grow` names the role that gets a node of the other one; empty: leave all as it is."""

    grow: str
    reason: str
    pressure: Pressure | None = None


def pressure(seen: Observation, model: LatencyModel, slo: Slo) -> Pressure:
    """Nodes that the observed work needs, per node that is there."""
    return Pressure(
        _prefill_nodes(seen, model, slo.ttft_s) / max(1, seen.num_prefill),
        _decode_nodes(seen, model, slo.tpot_s) / max(1, seen.num_decode),
    )


def _prefill_nodes(seen: Observation, model: LatencyModel, ttft_s: float) -> float:
    a, b, c = model.prefill
    service_s = a + b * seen.prompt_tokens + c * seen.prompt_squares
    waits = (ttft_s - service_s) / (TAIL * service_s / 2)  # u / (1 - u) may be so much
    if waits <= 0:
        return IMPOSSIBLE
    return seen.requests_per_s * service_s * (1 + waits) / waits


def _decode_nodes(seen: Observation, model: LatencyModel, tpot_s: float) -> float:
    work = StepWork(decode_batch=1, decode_context=round(seen.context_tokens))
    empty_s = model.decode[0]
    request_s = model.step_s(work) - empty_s
    if tpot_s <= empty_s + request_s:
        return IMPOSSIBLE
    tokens_per_s = (tpot_s - empty_s) / request_s / tpot_s if request_s > 0 else float("inf")
    return seen.requests_per_s * seen.output_tokens / tokens_per_s


def decide(
    seen: Observation, state: State, now: float, model: LatencyModel, slo: Slo, limits: Limits
) -> tuple[Decision, State]:
    """Whether to move a node now, and why (not); the state for the next time."""
    if seen.num_requests < limits.min_requests:
        reason = f"{seen.num_requests} requests lately are too few to judge by"
        return Decision("", reason), replace(state, wanted="")
    at_present = pressure(seen, model, slo)
    better, reason = _better_split(seen, at_present, model, slo, limits)
    if not better:
        return Decision("", reason, at_present), replace(state, wanted="")
    if better != state.wanted:
        state = replace(state, wanted=better, wanted_since=now)
    if now - state.moved_at < limits.pause_s:
        return Decision("", f"{reason}, but a node has just moved", at_present), state
    if now - state.wanted_since < limits.hold_s:
        return Decision("", f"{reason}, if that stays so", at_present), state
    return Decision(better, reason, at_present), State(moved_at=now)


def _better_split(
    seen: Observation, at_present: Pressure, model: LatencyModel, slo: Slo, limits: Limits
) -> tuple[str, str]:
    """The role that should grow, or an empty name, and the sentence that says why."""
    if at_present.worst * (seen.num_prefill + seen.num_decode) >= IMPOSSIBLE:
        return "", "a limit is below what a request alone takes: no split keeps it"
    if at_present.worst < limits.calm:
        return "", f"there is room: {at_present}"
    grow = "prefill" if at_present.prefill >= at_present.decode else "decode"
    step = 1 if grow == "prefill" else -1
    after = replace(seen, num_prefill=seen.num_prefill + step, num_decode=seen.num_decode - step)
    if min(after.num_prefill, after.num_decode) < 1:
        return "", f"each role keeps its last node: {at_present}"
    moved = pressure(after, model, slo)
    if moved.worst > at_present.worst * (1 - limits.margin):
        return "", f"a node more for {grow} would not help enough: {at_present}, then {moved}"
    return grow, f"{grow} needs a node: {at_present}, then {moved}"
