"""The timeline of one choice: phases that touch each other, so that they always add up.

arrived                                                       first token                     ended
   │ read │ tokenize │ queue │ reserve │ prefill-queue │ prefill │ network │ handoff │ decode │
   └──────────────────────── time to first token ────────────────────────┘

Every moment is in one phase; an event ends the open phase and opens the next. Times are whole
microseconds since arrival, so sums are exact. Every latency metric is a difference on this line.

When an attempt dies, what it cost is the phase `retry`: all of its time if the first token was not
there yet, else the time until there are tokens again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum


class Phase(StrEnum):
    """What a choice waits for."""

    READ = "read"  # the body
    TOKENIZE = "tokenize"  # validation, chat template, tokenizer
    QUEUE = "queue"  # for its turn, or for a decode node with room
    RESERVE = "reserve"  # for the decode node's grant
    PREFILL_QUEUE = "prefill-queue"  # on the prefill node, before its first step
    PREFILL = "prefill"  # computing; all of prefilling if the node did not say more
    NETWORK = "network"  # the rest of prefilling: messages on their way, busy loops
    HANDOFF = "handoff"  # first token → the decode node's first word
    DECODE = "decode"
    RETRY = "retry"


MEANING = {
    Phase.READ: "the request's body arrives",
    Phase.TOKENIZE: "validation, chat template, tokenizer",
    Phase.QUEUE: "waits for its turn or for a decode node with room",
    Phase.RESERVE: "waits for the decode node's grant",
    Phase.PREFILL_QUEUE: "waits on its node for the first step of its prompt",
    Phase.PREFILL: "the prompt is computed",
    Phase.NETWORK: "the rest until the first token: messages on their way",
    Phase.HANDOFF: "from the first token to the decode node's first word",
    Phase.DECODE: "the decode node produces tokens",
    Phase.RETRY: "lost with an attempt that died",
}


@dataclass(frozen=True, slots=True)
class Span:
    """One phase, from `start` to `end` microseconds after arrival."""

    phase: Phase
    start: int
    end: int


@dataclass(slots=True, eq=False)
class Timeline:
    """`arrived` and every `now` are monotonic seconds; an earlier `now` counts as the last one."""

    arrived: float
    dispatched: int | None = None  # microseconds since arrival, like all that follow
    first_token: int | None = None
    last_token: int | None = None
    ended: int | None = None
    _spans: list[Span] = field(default_factory=list)  # what is over; touching, from 0 on
    _open: Phase = Phase.READ
    _attempt: int = 0  # spans before the current attempt's

    def copy(self) -> Timeline:
        """The same so far: the choices of a request begin together."""
        return replace(self, _spans=list(self._spans))

    # ------------------------------------------------------------ events

    def body_read(self, now: float) -> None:
        self._enter(Phase.TOKENIZE, now)

    def tokenized(self, now: float) -> None:
        self._enter(Phase.QUEUE, now)

    def reserving(self, now: float) -> None:
        """A decode node was asked, perhaps the next one after a refusal."""
        self._dispatch(Phase.RESERVE, now)

    def prefilling(self, now: float) -> None:
        """The prefill node was told to begin."""
        self._dispatch(Phase.PREFILL, now)

    def waiting(self, now: float) -> None:
        """No decode node has room: asking them was part of the queue."""
        if self.first_token is None and self.ended is None:
            self._forget_attempt()
            self._open = Phase.QUEUE

    def attempt_over(self, now: float) -> None:
        """The attempt died; another one may follow."""
        if self.ended is not None:
            return
        if self.first_token is None:
            self._forget_attempt()
            self._open = Phase.RETRY
            self._enter(Phase.QUEUE, now)
        else:
            self._enter(Phase.RETRY, now)

    def decoding(self, now: float) -> None:
        """The decode node has spoken."""
        if self._open is Phase.HANDOFF:
            self._enter(Phase.DECODE, now)

    def tokens(
        self, now: float, *, from_decode: bool, prefill_s: tuple[float, float] | None = None
    ) -> float | None:
        """New tokens; returns the seconds since the previous ones.

        Args:
            prefill_s: with the first token, how long the prefill node says that it waited and
                computed; what it cannot know is `network`.
        """
        if self.ended is not None:
            return None
        at, previous = self.at(now), self.last_token
        if self.first_token is None:
            self._split_prefill(at, prefill_s)
            self.first_token = at
        self._enter(Phase.DECODE if from_decode else Phase.HANDOFF, now)
        self.last_token = at
        return None if previous is None else (at - previous) / 1e6

    def end(self, now: float) -> None:
        """Nothing follows."""
        if self.ended is None:
            self.ended = self.at(now)
            self._close(self.ended)

    # ------------------------------------------------------------ what it tells

    def spans(self, now: float | None = None) -> list[Span]:
        """All phases; with `now`, the one that is open too."""
        if now is None or self.ended is not None:
            return list(self._spans)
        return [*self._spans, Span(self._open, self._last, self.at(now))]

    def spans_to_first_token(self) -> list[Span]:
        """The phases that make up the time to the first token."""
        end = -1 if self.first_token is None else self.first_token
        return [span for span in self._spans if span.end <= end]

    def at(self, now: float) -> int:
        """Microseconds from arrival to `now`, never less than at the last event."""
        return max(self._last, self.last_token or 0, round((now - self.arrived) * 1e6))

    @property
    def queue_s(self) -> float | None:
        return _seconds(0, self.dispatched)

    @property
    def time_to_first_token_s(self) -> float | None:
        return _seconds(0, self.first_token)

    @property
    def prefill_s(self) -> float | None:
        return _seconds(self.dispatched, self.first_token)

    @property
    def decode_s(self) -> float | None:
        return _seconds(self.first_token, self.last_token)

    @property
    def inference_s(self) -> float | None:
        return _seconds(self.dispatched, self.last_token)

    @property
    def total_s(self) -> float | None:
        return _seconds(0, self.last_token)

    # ------------------------------------------------------------ inside

    @property
    def _last(self) -> int:
        return self._spans[-1].end if self._spans else 0

    def _enter(self, phase: Phase, now: float) -> None:
        if self.ended is None and phase is not self._open:
            self._close(self.at(now))
            self._open = phase

    def _close(self, end: int) -> None:
        """End the open phase; next to one of its own kind it is the same one, going on."""
        start = self._last
        if self._spans and self._spans[-1].phase is self._open and not self._at_boundary:
            start = self._spans.pop().start
        if end > start or not self._spans:
            self._spans.append(Span(self._open, start, end))

    @property
    def _at_boundary(self) -> bool:
        return self._last == self.first_token

    def _dispatch(self, phase: Phase, now: float) -> None:
        """A message to a node of an attempt; after the first token a retry goes on."""
        if self.first_token is not None or self.ended is not None:
            return
        if self._open not in (Phase.RESERVE, Phase.PREFILL):
            self._enter(phase, now)
            self._attempt = len(self._spans)
            if self.dispatched is None:
                self.dispatched = self._last
        else:
            self._enter(phase, now)

    def _forget_attempt(self) -> None:
        """Whatever follows takes the time of the attempt's phases."""
        if self._open in (Phase.RESERVE, Phase.PREFILL):
            del self._spans[self._attempt :]

    def _split_prefill(self, end: int, said: tuple[float, float] | None) -> None:
        start = self._last
        if self._open is Phase.PREFILL and said is not None:
            queued = min(start + round(said[0] * 1e6), end)
            computed = min(queued + round(said[1] * 1e6), end)
            cuts = ((Phase.PREFILL_QUEUE, queued), (Phase.PREFILL, computed))
            for self._open, cut in cuts:
                self._close(cut)
            self._open = Phase.NETWORK
        self._close(end)


def _seconds(start: int | None, end: int | None) -> float | None:
    return None if start is None or end is None else (end - start) / 1e6
