"""Mixed nodes: a pair becomes two of them under load, and each serves requests alone after that.

What they say is compared with what the pair said when it handed over.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.questions import Question, asking, assert_right, right_answer
from tests.e2e.test_faults import ask_many, assert_whole, num_moved, until_busy
from tests.e2e.test_role_switch_live import outcome, switch
from tests.e2e.test_strikes import wait_struck

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

QUESTION = Question()  # several chunks of 64 tokens
SAMPLED: dict[str, Any] = {"prompt": "def told(x):", "temperature": 0.9, "seed": 4}
TOLD: list[dict[str, Any]] = [
    {"logprobs": 2, "echo": True, "max_tokens": 8, "n": 2},
    {"prompt_logprobs": 1, "max_tokens": 8, "best_of": 3, "n": 2, "presence_penalty": 0.5},
    {"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}, "max_tokens": 30},
    {"use_beam_search": True, "n": 2, "max_tokens": 8, "temperature": 0.0},
    {"max_tokens": 1, "logprobs": 1},
]


async def complete(fleet: Fleet, **fields: Any) -> dict[str, Any]:
    """An answer in one piece, but for its id, its time, and what a cache had of the prompt."""
    async with Client(fleet.url) as client:
        (answer,) = (await client.complete(model=fleet.model.name, **fields)).chunks
    del answer["usage"]["prompt_tokens_details"]
    return {key: answer[key] for key in ("choices", "usage")}


async def tell_all(fleet: Fleet) -> list[dict[str, Any]]:
    return [await complete(fleet, **SAMPLED | fields) for fields in TOLD]


def served(fleet: Fleet, path: str) -> Any:
    async def get() -> Any:
        async with Client(fleet.url) as client, client.session.get(path) as response:
            return await response.json()

    return asyncio.run(get())


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    """Both nodes change roles while they answer; nothing that they say does."""
    fleet = make_shared_fleet()
    fleet.start_router("--node-timeout-s", "2")
    flags = ("--max-num-batched-tokens", "64", "--lease-ttl-s", "1")
    for role, name in (("prefill", "left"), ("decode", "right")):
        fleet.start_node(role, name, *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    right_answer(fleet, QUESTION)
    told = asyncio.run(tell_all(fleet))
    undisturbed = asyncio.run(ask_many(fleet, 6))
    assert_whole(undisturbed)

    async def become_mixed() -> None:
        await until_busy(fleet, "right")
        for name in ("left", "right"):
            await switch(fleet, name, "mixed", drain_s=1)
            assert (await outcome(fleet))["outcome"] == "done"

    answers = asyncio.run(ask_many(fleet, 6, become_mixed))
    assert_whole(answers)
    assert [a.text for a in answers] == [a.text for a in undisturbed]
    for node in fleet.nodes.values():
        node.recipe = ("mixed", flags)
    assert asyncio.run(tell_all(fleet)) == told
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


def test_one_node_computes_the_prompt_and_answers(fleet: Fleet) -> None:
    with asking(fleet, QUESTION) as answer:
        assert_right(fleet, QUESTION, answer.result(60))
    assert {node["role"] for node in served(fleet, "/debug/fleet")["nodes"]} == {"mixed"}
    last = served(fleet, "/debug/requests")["requests"][0]
    (choice,) = served(fleet, f"/debug/requests/{last['id']}")["choices"]
    (attempt,) = choice["attempts"]
    assert attempt["prefill"] == attempt["decode"]
    assert attempt["transfer"] is None
    assert attempt["prefill_timing"]["num_steps"] > 1
    first = [phase for phase in choice["phases"] if phase["phase"] != "decode"]
    assert sum(round(phase["seconds"] * 1e6) for phase in first) == round(choice["ttft_s"] * 1e6)


@pytest.mark.parametrize("act", ["kill", "stop"])
@pytest.mark.parametrize("step", [2, 12])
def test_the_other_node_goes_on(fleet: Fleet, act: str, step: int) -> None:
    """In the middle of the prompt, and of the answer."""
    nodes = list(fleet.nodes.values())
    for node in nodes:
        node.order("strike", act=act, point="token", nth=step)
    with asking(fleet, QUESTION) as answer:
        victim = wait_struck(nodes)
        for node in nodes:
            if node is not victim:
                node.behave()
        assert_right(fleet, QUESTION, answer.result(60))
        if act == "stop":
            victim.send(signal.SIGCONT)


def test_clients_that_hang_up_free_everything(fleet: Fleet) -> None:
    async def hang_up() -> None:
        async with Client(fleet.url) as client:
            ask: dict[str, Any] = {
                "model": fleet.model.name,
                "max_tokens": 1500,
                "ignore_eos": True,
            }
            prompts = [f"# file {i}\n" * 20 for i in range(6)]
            await asyncio.gather(
                *(client.stream(stop_after=2, prompt=prompt, **ask) for prompt in prompts)
            )

    asyncio.run(hang_up())
    fleet.assert_balanced(timeout_s=5)
    assert all(node.look()["attempts"] == 0 for node in fleet.nodes.values())


def test_a_mixed_node_becomes_another_and_hands_back_what_it_has(fleet: Fleet) -> None:
    undisturbed = asyncio.run(ask_many(fleet, 6))
    before = fleet.nodes["left"].metrics()["baton_sampled_tokens_total"]

    async def become_prefill() -> None:
        await until_busy(fleet, "left", before + 20)
        await switch(fleet, "left", "prefill", drain_s=0)
        assert (await outcome(fleet))["outcome"] == "done"

    moved = num_moved(fleet)
    answers = asyncio.run(ask_many(fleet, 6, become_prefill))
    assert_whole(answers)
    assert [a.text for a in answers] == [a.text for a in undisturbed]
    assert num_moved(fleet) > moved, "it disturbed nobody"
    with asking(fleet, QUESTION) as answer:  # from a prefill node to a mixed one
        assert_right(fleet, QUESTION, answer.result(60))
    assert fleet.nodes["right"].metrics()['baton_handoffs_total{outcome="committed"}'] > 0
