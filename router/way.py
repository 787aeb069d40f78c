"""Whether a request is handed over or served by one node alone: a pure function.

    handed over   queue and prompt on the prefill node, then the handoff
    in place      queue and prompt between the steps of the node that answers, whose streams wait

Neither is always better. Where little is missing of a prompt, or prefill nodes have a queue, it is
sooner computed where it is answered; but the streams there stand still for as long. So what prompts
take of their time is bounded. Within that bound the way with more slack wins: the greater of
predicted TTFT and TPOT, in parts of their limits; without limits, the earlier second token, which
is what a handoff delays.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from router.pace import Pace
from tuner.goodput import Slo
from tuner.latency import StepWork

NO_STREAMS = StepWork()
IDLE_GAIN = 2.0  # an idle node takes any prompt that would wait so many times as long elsewhere


class Mode(StrEnum):
    """What `--handoff` says; each takes the other way where its own is not open."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Reason(StrEnum):
    """Why it was this way."""

    ONLY = "only_way"
    FORCED = "forced"
    UNKNOWN = "unknown"  # nothing is measured yet
    FAILING = "failing"  # blocks do not come through, as far as anybody knows
    SHORT = "short"  # almost all of it is cached where it is answered
    STREAMS = "streams"  # they would wait too long
    IDLE = "idle"  # nobody waits on the node that answers, and many do elsewhere
    SOONER = "sooner"
    SLACK = "slack"
    TRIAL = "trial"  # nothing was handed over for long: what is known of that may be out of date


@dataclass(frozen=True, slots=True)
class Rules:
    """What the choice goes by.

    Args:
        slo: limits that requests should keep, if there are any.
        share: of their time that prompts in place may take from a node's streams.
        short: what may be missing of a prompt that the answering node has in its cache, to be
            computed there as long as nothing is measured.
    """

    mode: Mode = Mode.AUTO
    slo: Slo | None = None
    share: float = 0.5
    short: int = 16


@dataclass(frozen=True, slots=True)
class Part:
    """A node's part in serving a request: a prompt of `num_tokens` behind what it has to do."""

    num_tokens: int
    num_cached: int  # of the prompt
    num_queued: int  # prompt tokens before it
    streams: StepWork = NO_STREAMS  # that decode there
    lately_s: float = 0.0  # that prompts have lately taken of those streams' time

    @property
    def num_known(self) -> int:
        """At least the last token is computed, whatever is cached."""
        return min(self.num_cached, self.num_tokens - 1)

    @property
    def is_idle(self) -> bool:
        return not (self.num_queued or self.streams.decode_batch)


@dataclass(frozen=True, slots=True)
class Over:
    """The way by a handoff: who computes, who answers, and what has to be sent.

    Args:
        streams: where it will be answered.
        failing: that pair has failed of late, or its sender this very request.
    """

    sender: Part
    streams: StepWork
    lately_s: float
    num_bytes: int
    failing: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """The choice. Predicted are seconds from now to the first token, and from there to the next.

    `taken_s`: what the prompt would take of the streams' time in place.
    """

    hand_over: bool
    reason: Reason
    over_s: tuple[float, float] | None = None
    in_place_s: tuple[float, float] | None = None
    taken_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Forecast:
    """What becomes of a request on one way, and of the streams beside it."""

    first_s: float
    gap_s: float  # from the first token to the second
    taken: float  # share of its streams' time that prompts take
    token_s: float  # a step of those streams, without prompts

    @property
    def times(self) -> tuple[float, float]:
        return self.first_s, self.gap_s

    @property
    def second_s(self) -> float:
        return self.first_s + self.gap_s

    @property
    def tpot_s(self) -> float:
        return self.token_s / (1 - self.taken) if self.taken < 1 else float("inf")


def choose_way(
    over: Over | None, in_place: Part | None, pace: Pace | None, rules: Rules
) -> Verdict:
    """How to serve a request; of the two ways at least one is open."""
    assert over is not None or in_place is not None
    if over is None or in_place is None:
        return Verdict(over is not None, Reason.ONLY)
    if rules.mode is not Mode.AUTO:
        return Verdict(rules.mode is Mode.ALWAYS, Reason.FORCED)
    if over.failing:
        return Verdict(False, Reason.FAILING)
    if pace is None:
        rest = in_place.num_tokens - in_place.num_known
        short = in_place.num_known > 0 and rest <= rules.short
        return Verdict(not short, Reason.SHORT if short else Reason.UNKNOWN)
    there, here = _handed_over(over, pace), _in_place(in_place, pace)
    hand_over, reason = _compare(there, here, in_place.is_idle, rules)
    return Verdict(hand_over, reason, there.times, here.times, _own_s(in_place, pace))


def _compare(there: _Forecast, here: _Forecast, idle: bool, rules: Rules) -> tuple[bool, Reason]:
    if idle and there.first_s > IDLE_GAIN * here.first_s:
        return False, Reason.IDLE
    if here.taken > rules.share:
        return True, Reason.STREAMS
    if rules.slo is not None:
        return _strain(there, rules.slo) < _strain(here, rules.slo), Reason.SLACK
    return there.second_s < here.second_s, Reason.SOONER


def _strain(way: _Forecast, slo: Slo) -> float:
    """The greater of both times in parts of its limit."""
    return max(way.first_s / slo.ttft_s, way.tpot_s / slo.tpot_s)


def _handed_over(over: Over, pace: Pace) -> _Forecast:
    token_s = pace.token_s(over.streams)
    gap_s = pace.handoff_s(over.num_bytes) + token_s
    taken = over.lately_s / pace.stream_s
    return _Forecast(_first_s(over.sender, pace), gap_s, taken, token_s)


def _in_place(part: Part, pace: Pace) -> _Forecast:
    """Everything that waits there is computed between its streams' tokens, and so is this."""
    token_s = pace.token_s(part.streams)
    taken = (part.lately_s + _own_s(part, pace)) / pace.stream_s
    return _Forecast(_first_s(part, pace), token_s, taken, token_s)


def _first_s(part: Part, pace: Pace) -> float:
    queue_s = pace.queue_s(part.num_queued, part.streams)
    return queue_s + pace.between_s(part.num_known, part.num_tokens, part.streams)


def _own_s(part: Part, pace: Pace) -> float:
    return pace.prompt_s(part.num_known, part.num_tokens)
