"""Drafters for tests: right as often as a test wants, or as wrong as can be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from engine.drafting.control import Controller
from engine.drafting.drafter import Ask
from engine.drafting.speculation import Speculation
from engine.request import Request

Tokens = Callable[[Request], Sequence[int]]


class Oracle:
    """Knows what each request comes to (all its tokens), and says something else now and then."""

    method = "oracle"
    cost_per_token = False

    def __init__(self, tokens_of: Tokens, share: float, *, vocab_size: int, seed: int = 0) -> None:
        self._tokens_of = tokens_of
        self._share = share
        self._vocab_size = vocab_size
        self._rng = random.Random(seed)
        self.num_accepted = 0

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        return [self._draft(ask) for ask in asks]

    def _draft(self, ask: Ask) -> list[int]:
        start = ask.request.num_tokens
        right = self._tokens_of(ask.request)[start : start + ask.num_tokens]
        return [self._perhaps(token) for token in right]

    def _perhaps(self, token: int) -> int:
        if self._rng.random() < self._share:
            return token
        return (token + self._rng.randrange(1, self._vocab_size)) % self._vocab_size

    def accepted(self, request: Request, num_tokens: int) -> None:
        self.num_accepted += num_tokens


class Mischief:
    """Tokens that there are not, too many of them, nothing at all, and errors."""

    method = "mischief"
    cost_per_token = False

    def __init__(self, drafts: Sequence[Sequence[int]], *, fail_after: int | None = None) -> None:
        self._drafts = drafts
        self._left = fail_after
        self.num_calls = 0
        self.num_right = 0

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        self.num_calls += 1
        if self._left is not None and self.num_calls > self._left:
            raise RuntimeError("the drafter broke")
        return [self._drafts[self.num_calls % len(self._drafts)] for _ in asks]

    def accepted(self, request: Request, num_tokens: int) -> None:
        """Nothing is learned."""
        self.num_right += num_tokens


def always(
    drafter: Oracle | Mischief, most: int, vocab_size: int, clock: Callable[[], float] = float
) -> Speculation:
    """Speculation that drafts as much as it may, whatever it costs."""
    controller = Controller(most, adaptive=False)
    return Speculation(drafter, controller, vocab_size=vocab_size, clock=clock)
