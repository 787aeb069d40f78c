"""The token log: what one choice has produced, whoever produced it and however often it is told.

    logged  | t0 t1 t2 t3 |            num_logged = 4
    update              | t3 t4 |      index 3: t3 must be equal, t4 is new
    update                       | t6  index 6: held until t4 and t5 are there, resend is asked

A token enters the log once, only from the current attempt, and never changes: the client's text
cannot contradict itself, whatever dies. A known index with another token is a divergence, and so is
a new token without its logprobs where the request asks for them: they come with their token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.work import Work
from wire.logprobs import UNKNOWN, Logprobs
from wire.types import FinishReason

MAX_HELD_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Accepted:
    """`tokens` are new (none: all were known); `finish` if the log is complete now."""

    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None
    rows: tuple[bytes, ...] = ()  # their logprobs, where the request asks for them


@dataclass(frozen=True, slots=True)
class Gap:
    """The update begins beyond the log's end; ask to resend from this index."""

    resend_from: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """The update contradicts what is logged at `index`; the attempt must end."""

    index: int


NOTHING = Accepted()
NO_LOGPROBS = Logprobs()


@dataclass(frozen=True, slots=True)
class _Update:
    """What one message says of the log."""

    tokens: tuple[int, ...]
    finish: FinishReason | None
    logprobs: Logprobs


class TokenLog:
    """Output tokens of one choice, over all its attempts.

    Args:
        wants_rows: new tokens must come with their logprobs.
        num_prompt_rows: the first token must come with the logprobs of so many prompt tokens.
    """

    def __init__(self, *, wants_rows: bool = False, num_prompt_rows: int = 0) -> None:
        self.tokens: list[int] = []
        self.prompt_rows: tuple[bytes, ...] = ()
        self.attempt = 0
        self.finish: FinishReason | None = None
        self._wants_rows = wants_rows
        self._num_prompt_rows = num_prompt_rows
        self._held: dict[int, _Update] = {}
        self._num_held = 0

    @classmethod
    def of(cls, work: Work) -> TokenLog:
        """The log of a choice, which insists on the logprobs that the choice asks for."""
        sampling = work.sampling
        asks = sampling.prompt_logprobs is not None
        return cls(
            wants_rows=sampling.logprobs is not None,
            num_prompt_rows=work.num_tokens - 1 if asks else 0,
        )

    def begin_attempt(self, attempt: int) -> None:
        """From now on only `attempt` may add tokens."""
        assert attempt > self.attempt
        self.attempt = attempt
        self._drop_held()

    @property
    def has_gap(self) -> bool:
        return bool(self._held)

    def accept(
        self,
        attempt: int,
        index: int,
        tokens: tuple[int, ...],
        finish: FinishReason | None,
        logprobs: Logprobs | None = None,
    ) -> Accepted | Gap | Divergence:
        """Log what is new in an update whose first token is output token `index`."""
        if attempt != self.attempt or self.finish is not None:
            return NOTHING
        update = _Update(tokens, finish, logprobs or NO_LOGPROBS)
        if index > len(self.tokens):
            self._hold(index, update)
            return Gap(len(self.tokens))
        verdict = self._append(index, update)
        return self._with_held(verdict) if self._held else verdict

    def _append(self, index: int, update: _Update) -> Accepted | Divergence:
        tokens, finish = update.tokens, update.finish
        num_logged = len(self.tokens)
        if index < num_logged:
            differing = _first_difference(self.tokens[index : index + len(tokens)], tokens)
            if differing is not None:
                return Divergence(index + differing)
            if finish is not None and index + len(tokens) < num_logged:
                return Divergence(index + len(tokens))
        new = tokens[num_logged - index :]
        rows: tuple[bytes, ...] = ()
        if new and (self._wants_rows or self._num_prompt_rows):
            rows = update.logprobs.tokens[num_logged - index :]
            if not self._take_rows(rows, len(new), update.logprobs.prompt):
                return Divergence(num_logged)
        self.tokens.extend(new)
        self.finish = finish
        return Accepted(new, finish, rows)

    def _take_rows(
        self, rows: tuple[bytes, ...], num_new: int, prompt_rows: tuple[bytes, ...]
    ) -> bool:
        """Whether new tokens have the logprobs that they must have; keeps the prompt's."""
        if self._wants_rows and (len(rows) != num_new or UNKNOWN in rows):
            return False
        if self._num_prompt_rows and not self.tokens:
            self.prompt_rows = prompt_rows
            return len(prompt_rows) == self._num_prompt_rows and UNKNOWN not in prompt_rows
        return True

    def _with_held(self, verdict: Accepted | Divergence) -> Accepted | Divergence:
        """Go on with held updates that the log has reached."""
        new: tuple[int, ...] = ()
        rows: tuple[bytes, ...] = ()
        while isinstance(verdict, Accepted):
            new += verdict.tokens
            rows += verdict.rows
            reached = [index for index in self._held if index <= len(self.tokens)]
            if self.finish is not None or not reached:
                return Accepted(new, self.finish, rows)
            index = min(reached)
            update = self._held.pop(index)
            self._num_held -= len(update.tokens)
            verdict = self._append(index, update)
        self._drop_held()
        return verdict

    def _hold(self, index: int, update: _Update) -> None:
        """Keep it for later; what does not fit is dropped, since a resend repeats it."""
        fits = self._num_held + len(update.tokens) <= MAX_HELD_TOKENS
        if fits and index not in self._held:
            self._held[index] = update
            self._num_held += len(update.tokens)

    def _drop_held(self) -> None:
        self._held.clear()
        self._num_held = 0


def _first_difference(logged: Sequence[int], told: Sequence[int]) -> int | None:
    for offset, (old, new) in enumerate(zip(logged, told, strict=False)):
        if old != new:
            return offset
    return None
