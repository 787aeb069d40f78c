"""A thousand requests of which a third hang up at random: the others are right, nothing leaks."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_REQUESTS = 1000
NUM_PROMPTS = 40  # few enough to be asked alone before
AT_ONCE = 32
MAX_TOKENS = 8
DECODE_NODES = (("decode-0", "auto"), ("decode-1", "auto"))


async def ask(client: Client, fleet: Fleet, number: int, stop_after: int | None = None) -> Answer:
    """A prompt of 1 to 12 blocks; some share their beginnings, so that caches matter."""
    lines = "".join(f"def f{number % 8}_{n}(self):\n" for n in range(1 + 5 * (number % 5)))
    return await client.stream(
        stop_after=stop_after,
        model=fleet.model.name,
        prompt=f"{lines}# {number}\n",
        max_tokens=MAX_TOKENS,
        temperature=1.0,
        seed=number,
        ignore_eos=True,
    )


async def ask_alone(fleet: Fleet) -> list[str]:
    async with Client(fleet.url) as client:
        answers = [await ask(client, fleet, number) for number in range(NUM_PROMPTS)]
    assert all(answer.finish_reason == "length" for answer in answers)
    return [answer.text for answer in answers]


async def hang_up_or_finish(
    client: Client, fleet: Fleet, number: int, chance: random.Random
) -> Answer | None:
    """A third hang up: before the answer begins, or after some of its chunks."""
    if chance.random() >= 1 / 3:
        return await ask(client, fleet, number)
    if chance.random() < 0.5:
        await ask(client, fleet, number, stop_after=chance.randint(1, MAX_TOKENS - 1))
        return None
    request = asyncio.ensure_future(ask(client, fleet, number))
    await asyncio.wait([request], timeout=chance.expovariate(20))
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)
    return None


async def storm(fleet: Fleet, seed: int) -> list[tuple[int, Answer]]:
    """The answers that were waited for."""
    chance = random.Random(seed)
    numbers = [chance.randrange(NUM_PROMPTS) for _ in range(NUM_REQUESTS)]
    finished = []

    async def work(client: Client) -> None:
        while numbers:
            number = numbers.pop()
            answer = await hang_up_or_finish(client, fleet, number, chance)
            if answer is not None:
                finished.append((number, answer))

    async with Client(fleet.url) as client:
        await asyncio.gather(*(work(client) for _ in range(AT_ONCE)))
    return finished


def test_a_thousand_requests(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    fleet.start_router()
    flags = ("--lease-ttl-s", "2", "--max-num-batched-tokens", "256")
    for name, transport in (("prefill-0", "shm"), ("prefill-1", "zmq"), *DECODE_NODES):
        fleet.start_node(name[:-2], name, *flags, "--transport", transport)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    alone = asyncio.run(ask_alone(fleet))
    finished = asyncio.run(storm(fleet, seed=7))
    assert NUM_REQUESTS / 2 < len(finished) < NUM_REQUESTS
    for number, answer in finished:
        assert (answer.status, answer.error) == (200, None)
        assert answer.done
        assert answer.text == alone[number]
    fleet.assert_balanced()
    for node in fleet.nodes.values():
        books = node.look()
        assert (books["attempts"], books["leases"]) == (0, [])
    assert asyncio.run(ask_alone(fleet)) == alone
