"""Drafts by looking the last tokens up in what came before, prompt and output.

    ... the cat sat on the mat . the cat        the last tokens stood here before:
        ^^^^^^^ ─ sat on the ... ─▶ draft       what followed then may follow now

Saxena 2023 (prompt lookup decoding). The longest suffix of `min_tokens` to `max_tokens` tokens that
occurs again counts, and of its occurrences the last. A draft that reaches the end of the text goes
on with its own beginning, so a text of period p is drafted at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.drafting.drafter import Ask
from engine.request import Request

Tokens = NDArray[np.int32]


@dataclass(slots=True)
class _Text:
    """A request's tokens as an array that grows by doubling."""

    buffer: Tokens
    length: int = 0

    def follow(self, tokens: list[int]) -> Tokens:
        """The array, brought up to date: tokens are only ever added."""
        total = len(tokens)
        if total > len(self.buffer):
            grown = np.empty(2 * total, np.int32)
            grown[: self.length] = self.buffer[: self.length]
            self.buffer = grown
        self.buffer[self.length : total] = tokens[self.length :]
        self.length = total
        return self.buffer[:total]


class NgramDrafter:
    """See engine.drafting.drafter.Drafter."""

    method = "ngram"
    cost_per_token = False

    def __init__(self, min_tokens: int, max_tokens: int) -> None:
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._texts: dict[str, _Text] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        """See Drafter."""
        known = self._texts
        self._texts = {
            ask.request.request_id: known.get(ask.request.request_id)
            or _Text(np.empty(2 * ask.request.num_tokens, np.int32))
            for ask in asks
        }
        return [self._draft(ask) for ask in asks]

    def _draft(self, ask: Ask) -> Sequence[int]:
        if not ask.num_tokens:
            return ()
        text = self._texts[ask.request.request_id].follow(ask.request.tokens)
        start = continuation(text, self._min_tokens, self._max_tokens)
        if start is None:
            return ()
        draft: list[int] = text[start : start + ask.num_tokens].tolist()
        period = len(draft)
        while len(draft) < ask.num_tokens:
            draft.append(draft[len(draft) - period])
        return draft

    def accepted(self, request: Request, num_tokens: int) -> None:
        """See Drafter; the text itself tells."""


def continuation(text: Tokens, min_tokens: int, max_tokens: int) -> int | None:
    """Where the text goes on behind the last earlier occurrence of its longest suffix there is."""
    ends = np.flatnonzero(text[:-1] == text[-1])  # where a suffix of one token occurs before
    found = None
    for length in range(1, min(max_tokens, len(text) - 1) + 1):
        if length > 1:
            ends = ends[ends >= length - 1]
            ends = ends[text[ends - (length - 1)] == text[-length]]
        if not len(ends):
            break
        if length >= min_tokens:
            found = int(ends[-1]) + 1
    return found
