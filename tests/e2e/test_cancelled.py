"""Many long requests whose clients all leave at once: nothing of them is left."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NUM_REQUESTS = 200
ZERO = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def sums(process: Process) -> tuple[float, ...]:
    """Running, waiting and use of the cache, over all their series."""
    metrics = process.metrics().items()
    return tuple(sum(v for k, v in metrics if k.partition("{")[0] == name) for name in ZERO)


async def ask_and_leave(fleet: Fleet) -> None:
    """All are in the router, some of them run, when they leave; a half of them stream."""
    assert fleet.router is not None
    router = fleet.router

    async with Client(fleet.url) as client:

        def ask(number: int) -> Any:
            body: dict[str, Any] = {
                "prompt": f"# file {number}\n" * 20,
                "max_tokens": 1500,
                "ignore_eos": True,
            }
            return client.stream(**body) if number % 2 else client.complete(**body)

        asked = [asyncio.ensure_future(ask(number)) for number in range(NUM_REQUESTS)]

        def all_there() -> bool:
            running, waiting, use = sums(router)
            return running + waiting == NUM_REQUESTS and use > 0

        await asyncio.to_thread(wait_until, all_there, "all have come")
        for request in asked:
            request.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        async with asyncio.timeout(30):
            answer = await client.stream(prompt="def f(", max_tokens=4, ignore_eos=True)
    assert (answer.error, answer.usage["completion_tokens"]) == (None, 4)


def test_nothing_is_left_of_cancelled_requests(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start()
    sampled = "baton_sampled_tokens_total"
    asyncio.run(ask_and_leave(fleet))
    assert fleet.router is not None
    for process in (fleet.router, *fleet.nodes.values()):
        wait_until(lambda p=process: not any(sums(p)), f"{process.name} is idle")  # type: ignore[misc]
    fleet.assert_balanced()
    done = fleet.nodes["decode-0"].metrics()[sampled]
    assert done < NUM_REQUESTS * 1500 / 4, "it went on for nobody"
    for node in fleet.nodes.values():
        books = node.look()
        assert (books["attempts"], books["leases"]) == (0, [])
