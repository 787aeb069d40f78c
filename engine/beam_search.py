"""Which beams live on: the arithmetic of one beam search, without a model and without blocks.

Each step gives every running beam its best next tokens. All continuations are ranked by the
sum of their log-probabilities:

    rank   1 .......... W ..................
           │            │ the best W that do not end are the running beams of the next step
           └ those that end here are finished: sum / length ** length_penalty, the best W are kept

This is transformers' search (`GenerationMixin._beam_search`), its three rules for ending early
included. The continuations that can matter of one beam are its best W and as many as there are
tokens that end a request, so nobody needs to sort whole rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from wire.logprobs import unpack
from wire.types import BeamParams, EarlyStopping, FinishReason, Hypothesis

Continuations = Sequence[tuple[int, float]]
"""A beam's best next tokens and their log-probabilities, best first."""


@dataclass(frozen=True, slots=True)
class Beam:
    """A hypothesis that goes on."""

    tokens: tuple[int, ...]
    logprob: float  # the sum of its tokens'


@dataclass(frozen=True, slots=True)
class _Ranked:
    logprob: float
    parent: int
    token: int


class BeamSearch:
    """One search: `advance` until it is `over`, then `finished` holds the best, best first.

    Args:
        max_tokens: no hypothesis becomes longer.
        min_tokens: none ends before it has so many.
        end_tokens: tokens that end a hypothesis.
    """

    def __init__(
        self,
        params: BeamParams,
        *,
        max_tokens: int,
        min_tokens: int = 0,
        end_tokens: Collection[int] = (),
    ) -> None:
        self._params = params
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._end_tokens = frozenset(end_tokens)
        self.running = [Beam((), 0.0)]  # best first
        self.finished: list[Hypothesis] = []  # best first
        self.over = False

    @property
    def length(self) -> int:
        """Output tokens of each running beam."""
        return len(self.running[0].tokens)

    @property
    def num_continuations(self) -> int:
        """How many of each beam `advance` must be told."""
        return num_continuations(self._params, self._end_tokens)

    def advance(self, rows: Sequence[Continuations]) -> list[int]:
        """Take the continuations of each running beam; the parents of the new running beams."""
        assert not self.over
        assert len(rows) == len(self.running), f"{len(rows)} rows for {len(self.running)} beams"
        ranked = self._ranked(rows)
        length, width = self.length + 1, self._params.width
        at_limit = length == self._max_tokens
        ending = [r for r in ranked[:width] if at_limit or r.token in self._end_tokens]
        self._finish(ending, length)
        going_on = [r for r in ranked if r.token not in self._end_tokens][:width]
        self.running = [self._beam(r) for r in going_on]
        self.over = at_limit or not going_on or not self._may_improve(length)
        return [r.parent for r in going_on]

    def _ranked(self, rows: Sequence[Continuations]) -> list[_Ranked]:
        """Best first; ties go to the better beam, then to the lower token."""
        may_end = self.length >= self._min_tokens
        found = [
            _Ranked(beam.logprob + logprob, parent, token)
            for parent, (beam, row) in enumerate(zip(self.running, rows, strict=True))
            for token, logprob in row
            if logprob > -math.inf and (may_end or token not in self._end_tokens)
        ]
        return sorted(found, key=lambda r: (-r.logprob, r.parent, r.token))

    def _beam(self, ranked: _Ranked) -> Beam:
        return Beam((*self.running[ranked.parent].tokens, ranked.token), ranked.logprob)

    def _finish(self, ending: list[_Ranked], length: int) -> None:
        for ranked in ending:
            stops = ranked.token in self._end_tokens
            self.finished.append(
                Hypothesis(
                    tokens=self._beam(ranked).tokens,
                    score=self._score(ranked.logprob, length),
                    finish=FinishReason.STOP if stops else FinishReason.LENGTH,
                )
            )
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self._params.width :]

    def _score(self, logprob: float, length: int) -> float:
        return float(logprob / length**self._params.length_penalty)

    def _may_improve(self, length: int) -> bool:
        """Whether going on can still change what is found, as far as the rule asks."""
        if len(self.finished) < self._params.width:
            return True
        rule = self._params.early_stopping
        if rule is EarlyStopping.WHEN_FULL:
            return False
        if rule is EarlyStopping.NEVER and self._params.length_penalty > 0:
            length = self._max_tokens
        return self._score(self.running[0].logprob, length) > self.finished[-1].score


def num_continuations(params: BeamParams, end_tokens: Collection[int]) -> int:
    """How many of a beam's best next tokens can matter."""
    return params.width + len(end_tokens)


def continuations(row: bytes) -> Continuations:
    """Those in a packed row of logprobs (wire/logprobs.py)."""
    return unpack(row).top
