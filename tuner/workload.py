"""What is asked: random prompts of given lengths, or of a trace's.

All of it is a function of the seed, so two runs with the same settings send the same requests.
Several runs on one server want the same lengths in other words: else each would find the prompts of
the one before in the server's prefix cache. That is an edition; text from a file has only one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import count

from tuner.trace import Trace, TracedRequest

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
    edition: int = 0  # another one asks for the same lengths in other words


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
        prompt, output_len = _prompt(workload, length, rng), workload.output_len.draw(rng)
        if workload.edition:
            prompt = _prompt(workload, length, _rng_of(workload, index))
        yield RequestSpec(index, prompt, output_len)


def _rng_of(workload: Workload, what: object) -> random.Random:
    """Randomness for `what`, of the workload's seed and edition."""
    edition = f"/edition-{workload.edition}" if workload.edition else ""
    return random.Random(f"{workload.seed}/{what}{edition}")


def _prompt(workload: Workload, length: int, rng: random.Random) -> Prompt:
    return _join(workload.prompt_kind, _pieces(workload, length, rng))


def _pieces(workload: Workload, length: int, rng: random.Random) -> list[int | str]:
    if workload.prompt_kind is PromptKind.WORDS:
        return [rng.choice(WORDS) for _ in range(length)]
    return [workload.token_ids.draw(rng) for _ in range(length)]


def _join(kind: PromptKind, pieces: list[int | str]) -> Prompt:
    if kind is PromptKind.WORDS:
        return " ".join(map(str, pieces))
    return tuple(map(int, pieces))


def trace_requests(trace: Trace, workload: Workload) -> Iterator[RequestSpec]:
    """A trace's requests with prompts made for them; lengths that it lacks are the workload's.

    Blocks of equal id get equal tokens, so prompts share exactly the prefixes that they shared.
    """
    for index, traced in enumerate(trace.requests):
        prompt = _traced_prompt(traced, trace.block_len, workload, _rng_of(workload, index))
        output_len = traced.output_len or workload.output_len.draw(
            random.Random(f"{workload.seed}/{index}/output")
        )
        yield RequestSpec(index, prompt, output_len)


def _traced_prompt(
    traced: TracedRequest, block_len: int, workload: Workload, rng: random.Random
) -> Prompt:
    if traced.text is not None:
        return traced.text
    shared: list[int | str] = []
    for block_id in traced.block_ids:
        shared += _block(workload, block_len, block_id)
    own_len = max(0, traced.input_len - len(shared))
    pieces = [*shared[: traced.input_len], *_pieces(workload, own_len, rng)]
    return _join(workload.prompt_kind, pieces)


@lru_cache(maxsize=4096)  # a popular prefix is made once
def _block(workload: Workload, length: int, block_id: int) -> tuple[int | str, ...]:
    """What the block of this id holds."""
    return tuple(_pieces(workload, length, _rng_of(workload, f"block/{block_id}")))
