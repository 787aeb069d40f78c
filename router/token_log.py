"""The token log: what one choice has produced, whoever produced it and however often it is told.

    logged  | t0 t1 t2 t3 |            num_logged = 4
    update              | t3 t4 |      index 3: t3 must be equal, t4 is new
    update                       | t6  index 6: held until t4 and t5 are there, resend is asked

A token enters the log once, only from the current attempt, and never changes: the client's text
cannot contradict itself, whatever dies. A known index with another token is a divergence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from wire.types import FinishReason

MAX_HELD_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Accepted:
    """`tokens` are new (none: all were known); `finish` if the log is complete now."""

    tokens: tuple[int, ...] = ()
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """The update begins beyond the log's end; ask to resend from this index."""

    resend_from: int


@dataclass(frozen=True, slots=True)
class Divergence:
    """The update contradicts what is logged at `index`; the attempt must end."""

    index: int


NOTHING = Accepted()


class TokenLog:
    """Output tokens of one choice, over all its attempts."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.attempt = 0
        self.finish: FinishReason | None = None
        self._held: dict[int, tuple[tuple[int, ...], FinishReason | None]] = {}
        self._num_held = 0

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
    ) -> Accepted | Gap | Divergence:
        """Log what is new in an update whose first token is output token `index`."""
        if attempt != self.attempt or self.finish is not None:
            return NOTHING
        if index > len(self.tokens):
            self._hold(index, tokens, finish)
            return Gap(len(self.tokens))
        verdict = self._append(index, tokens, finish)
        return self._with_held(verdict) if self._held else verdict

    def _append(
        self, index: int, tokens: tuple[int, ...], finish: FinishReason | None
    ) -> Accepted | Divergence:
        num_logged = len(self.tokens)
        if index < num_logged:
            differing = _first_difference(self.tokens[index : index + len(tokens)], tokens)
            if differing is not None:
                return Divergence(index + differing)
            if finish is not None and index + len(tokens) < num_logged:
                return Divergence(index + len(tokens))
        new = tokens[num_logged - index :]
        self.tokens.extend(new)
        self.finish = finish
        return Accepted(new, finish)

    def _with_held(self, verdict: Accepted | Divergence) -> Accepted | Divergence:
        """Go on with held updates that the log has reached."""
        new: tuple[int, ...] = ()
        while isinstance(verdict, Accepted):
            new += verdict.tokens
            reached = [index for index in self._held if index <= len(self.tokens)]
            if self.finish is not None or not reached:
                return Accepted(new, self.finish)
            index = min(reached)
            tokens, finish = self._held.pop(index)
            self._num_held -= len(tokens)
            verdict = self._append(index, tokens, finish)
        self._drop_held()
        return verdict

    def _hold(self, index: int, tokens: tuple[int, ...], finish: FinishReason | None) -> None:
        """Keep it for later; what does not fit is dropped, since a resend repeats it."""
        fits = self._num_held + len(tokens) <= MAX_HELD_TOKENS
        if fits and index not in self._held:
            self._held[index] = (tokens, finish)
            self._num_held += len(tokens)

    def _drop_held(self) -> None:
        self._held.clear()
        self._num_held = 0


def _first_difference(logged: Sequence[int], told: Sequence[int]) -> int | None:
    for offset, (old, new) in enumerate(zip(logged, told, strict=False)):
        if old != new:
            return offset
    return None
