"""What one row of logits belongs to: a request as it is, or as it would be behind draft tokens.

    tokens  | prompt ........ | output ....... | draft 0 | draft 1 |
    rows                            the last one     |         |
                                     Request      Ahead(1)  Ahead(2)

Each row is sampled by all the request's rules, as if its tokens were known. Draft tokens are taken
as long as each is what the row before it sampled, so what comes out is what would have come out
without them; the rows behind the first other token are of no use. What is wrong with a row behind
a draft token shows again in the next step, where it is the row of a known one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import Request
from wire.types import SamplingParams


class Row(Protocol):
    """What the sampler reads of a request."""

    @property
    def sampling(self) -> SamplingParams: ...

    @property
    def tokens(self) -> list[int]:
        """The prompt and all output before the token that is sampled."""
        ...

    @property
    def output_tokens(self) -> list[int]: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_output_tokens(self) -> int: ...


CORRUPTED = -1
"""In place of a token, where the row cannot be sampled from."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A request with `draft` behind its tokens."""

    request: Request
    draft: tuple[int, ...]

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def tokens(self) -> list[int]:
        return [*self.request.tokens, *self.draft]

    @property
    def output_tokens(self) -> list[int]:
        return [*self.request.output_tokens, *self.draft]

    @property
    def num_tokens(self) -> int:
        return self.request.num_tokens + len(self.draft)

    @property
    def num_output_tokens(self) -> int:
        return self.request.num_output_tokens + len(self.draft)


def accepted(draft: Sequence[int], sampled: Sequence[int]) -> tuple[int, ...]:
    """Of what a request's rows sampled, the tokens that follow one another: one at least.

    `sampled` has one token more than `draft`.
    """
    for count, (guess, token) in enumerate(zip(draft, sampled, strict=False), start=1):
        if guess != token or sampled[count] == CORRUPTED:
            return tuple(sampled[:count])
    return tuple(sampled)
