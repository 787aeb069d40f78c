"""Requests whose right answer is known, asked while something goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from tests.e2e.client import Answer, Client
from tests.e2e.fleet import Fleet, Process

_salts = count()


@dataclass(frozen=True)
class Question:
    """A prompt of `num_lines` (11 tokens each) and a `tail`, sampled with its own seed."""

    topic: str = "function"
    num_lines: int = 20
    max_tokens: int = 24
    seed: int = 1
    tail: str = ""

    @property
    def prompt(self) -> str:
        lines = (f"def {self.topic}_{n}(self):\n    return {n}\n" for n in range(self.num_lines))
        return "".join(lines) + self.tail


async def put(fleet: Fleet, question: Question, router: Process | None = None) -> Answer:
    """Ask it with a salt of its own: nothing of the prompt is in a cache."""
    async with Client(fleet.url if router is None else router.url) as client:
        return await client.stream(
            model=fleet.model.name,
            prompt=question.prompt,
            max_tokens=question.max_tokens,
            temperature=1.0,
            seed=question.seed,
            cache_salt=f"salt {next(_salts)}",
            ignore_eos=True,
        )


@contextmanager
def asking(
    fleet: Fleet, question: Question, router: Process | None = None
) -> Iterator[Future[Answer]]:
    """The answer comes while the block goes on; leaving it waits for the answer.

    Args:
        router: whom to ask, where there are several; None: the one that was started last.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(asyncio.run, put(fleet, question, router))


def answer_to(fleet: Fleet, question: Question) -> Answer:
    return asyncio.run(put(fleet, question))


def right_answer(fleet: Fleet, question: Question) -> Answer:
    """What the undisturbed fleet says; asked once."""
    if question not in fleet.known:
        answer = answer_to(fleet, question)
        assert_whole(answer, question)
        fleet.known[question] = answer
    return fleet.known[question]


def assert_whole(answer: Answer, question: Question) -> None:
    assert (answer.status, answer.error) == (200, None)
    assert answer.done
    assert answer.finish_reason == "length"
    assert answer.usage["completion_tokens"] == question.max_tokens


def assert_right(fleet: Fleet, question: Question, answer: Answer) -> None:
    """It is whole, and word for word the right one."""
    assert_whole(answer, question)
    assert answer.text == fleet.known[question].text


def assert_wrong(fleet: Fleet, question: Question, answer: Answer) -> None:
    """It looks like any other answer, and is not the right one: nobody was told."""
    assert_whole(answer, question)
    assert answer.text != fleet.known[question].text, "no trace of the damage: the test is blind"


def num_tokens(fleet: Fleet, question: Question) -> int:
    """Of its prompt."""
    return int(fleet.known[question].usage["prompt_tokens"])
