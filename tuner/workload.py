"""What is asked, and when: random prompts of given lengths and the times at which they are sent.

All of it is a function of the seed, so two runs with the same settings send the same requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count

# Short, common, and mostly one token each in any English vocabulary.
_WORDS = """
time year day way man thing life hand part child eye place work week case point home water room
book word area money story fact month lot right study night door side head house group light name
power game line end city team minute idea body back face level office car road
"""
WORDS = tuple(_WORDS.split())

Prompt = tuple[int, ...] | str


class PromptKind(StrEnum):
    """What a random prompt is made of."""

    TOKENS = "tokens"
    WORDS = "words"


class Arrival(StrEnum):
    """How the times between requests are distributed when a rate is given."""

    FIXED = "fixed"
    POISSON = "poisson"


@dataclass(frozen=True, slots=True)
class Span:
    """A length that is fixed (`lo == hi`) or uniform over lo..hi, both included."""

    lo: int
    hi: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """`"128"` or `"64:256"`.

        Raises:
            ValueError: anything else, or lengths below 1.
        """
        lo_text, colon, hi_text = text.partition(":")
        lo = int(lo_text)
        hi = int(hi_text) if colon else lo
        if not 1 <= lo <= hi:
            raise ValueError(f"{text!r}: expected N or LO:HI with 1 <= LO <= HI")
        return cls(lo, hi)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.lo, self.hi)

    def __str__(self) -> str:
        return str(self.lo) if self.lo == self.hi else f"{self.lo}:{self.hi}"


@dataclass(frozen=True, slots=True)
class Workload:
    """The distribution that requests are drawn from."""

    input_len: Span
    output_len: Span
    prompt_kind: PromptKind = PromptKind.TOKENS
    token_ids: Span = Span(10, 1000)  # almost every vocabulary has plain text tokens here
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to send."""

    index: int
    prompt: Prompt
    output_len: int


def requests(workload: Workload) -> Iterator[RequestSpec]:
    """An endless sequence of requests; request i does not depend on how many are taken."""
    for index in count():
        rng = random.Random(f"{workload.seed}/{index}")
        length = workload.input_len.draw(rng)
        yield RequestSpec(index, _prompt(workload, length, rng), workload.output_len.draw(rng))


def _prompt(workload: Workload, length: int, rng: random.Random) -> Prompt:
    if workload.prompt_kind is PromptKind.WORDS:
        return " ".join(rng.choice(WORDS) for _ in range(length))
    return tuple(workload.token_ids.draw(rng) for _ in range(length))


def arrival_offsets(rate: float, arrival: Arrival, seed: int) -> Iterator[float]:
    """Seconds from the start of the run at which to send requests 0, 1, 2, …; endless."""
    rng = random.Random(f"{seed}/arrivals")
    offset = 0.0
    for index in count():
        if arrival is Arrival.FIXED:
            yield index / rate
        else:
            yield offset
            offset += rng.expovariate(rate)
