"""What is remembered of one choice for people: its timeline, its attempts, and how it ended.

Holds no token and no text, and outlives the choice (`/debug/requests`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.way import Verdict
from telemetry.timeline import Timeline
from wire.request_messages import Embedding, PrefillTiming, TokenUpdate, TransferRecord
from wire.types import NodeId

RUNNING = ""


@dataclass(slots=True, eq=False)
class AttemptTrace:
    """One try on one pair of nodes. Times are microseconds since the request's arrival."""

    number: int
    prefill: NodeId
    decode: NodeId | None  # None: the first token was to be the last; `prefill`: it does all
    began: int
    ended: int | None = None
    cause: str = RUNNING  # why it ended; `finished`: well
    verdict: Verdict | None = None  # why it was there
    num_cached_tokens: int | None = None
    num_decode_messages: int = 0  # one per step that produced tokens
    timing: PrefillTiming | None = None
    transfer: TransferRecord | None = None


@dataclass(slots=True, eq=False)
class ChoiceTrace:
    """Fed by the table of running choices; every `now` is monotonic seconds."""

    request: str
    index: int
    num_prompt_tokens: int
    timeline: Timeline
    attempts: list[AttemptTrace] = field(default_factory=list)
    num_refusals: int = 0  # times that no decode node had room
    num_output_tokens: int = 0
    end: str = RUNNING  # finish reason, `abort`, or the error's code
    asked_at: float = 0.0  # when a decode node was asked for room, for the last time
    decode_spoke: bool = False  # whether the last one to speak was who answers

    @property
    def attempt(self) -> AttemptTrace | None:
        """The current one."""
        return self.attempts[-1] if self.attempts else None

    def reserving(self, number: int, prefill: NodeId, decode: NodeId, now: float) -> None:
        """A decode node was asked for room."""
        self.asked_at = now
        self.timeline.reserving(now)
        self._enter(number, prefill, decode, now)

    def prefilling(self, number: int, prefill: NodeId, now: float) -> None:
        """The prefill node was told to begin."""
        self.timeline.prefilling(now)
        attempt = self.attempt
        decode = attempt.decode if attempt is not None and attempt.number == number else None
        self._enter(number, prefill, decode, now)

    def offering(self, number: int, node: NodeId, now: float) -> None:
        """A node was asked to do everything, and begins at once."""
        self.timeline.prefilling(now)
        self._enter(number, node, node, now)

    def _enter(self, number: int, prefill: NodeId, decode: NodeId | None, now: float) -> None:
        attempt = self.attempt
        if attempt is None or attempt.number != number:
            self.attempts.append(AttemptTrace(number, prefill, decode, self.timeline.at(now)))
        else:
            attempt.prefill, attempt.decode = prefill, decode

    def waiting(self, now: float) -> None:
        """Nobody has room. An attempt that got nothing is not kept: there may be hundreds."""
        self.timeline.waiting(now)
        self.num_refusals += 1
        if self.attempts and self.attempts[-1].ended is None:
            del self.attempts[-1]

    def attempt_over(self, cause: str, now: float) -> None:
        """The attempt died."""
        self.timeline.attempt_over(now)
        self._end_attempt(cause, now)

    def heard(self, update: TokenUpdate, from_decode: bool, now: float) -> None:
        """A node of the current attempt speaks; whether its tokens are news is not known yet."""
        attempt = self.attempt
        self.decode_spoke = from_decode
        if attempt is None:
            return
        if update.timing is not None:
            attempt.timing = update.timing
        if update.num_cached_tokens is not None:
            attempt.num_cached_tokens = update.num_cached_tokens
        if from_decode and self.timeline.first_token is not None:
            self.timeline.decoding(now)

    def embedded(self, message: Embedding) -> None:
        """The prefill node has answered without a token."""
        self.decode_spoke = False
        if self.attempt is not None:
            self.attempt.timing = message.timing
            self.attempt.num_cached_tokens = message.num_cached_tokens

    def output(self, num_tokens: int, now: float) -> float | None:
        """They were news; returns the seconds since the previous ones."""
        attempt = self.attempt
        self.num_output_tokens += num_tokens
        timing = None if attempt is None else attempt.timing
        if attempt is not None:
            attempt.num_decode_messages += self.decode_spoke
        said = None if timing is None else (timing.queue_s, timing.compute_s)
        return self.timeline.tokens(now, from_decode=self.decode_spoke, prefill_s=said)

    def transferred(self, number: int, transfer: TransferRecord) -> None:
        """The prefill node tells what the handoff was like; perhaps after the choice's end."""
        for attempt in self.attempts:
            if attempt.number == number:
                attempt.transfer = transfer

    def ended(self, end: str, now: float) -> None:
        """Nothing follows; later calls change nothing."""
        if self.end == RUNNING:
            self.end = end
            self.timeline.end(now)
            self._end_attempt("finished" if end in ("stop", "length") else "revoked", now)

    def _end_attempt(self, cause: str, now: float) -> None:
        attempt = self.attempt
        if attempt is not None and attempt.ended is None:
            attempt.ended, attempt.cause = self.timeline.at(now), cause
