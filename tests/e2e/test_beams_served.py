"""Beam search over real nodes: transformers' hypotheses, also when the searching node is killed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "def fibonacci(n):\n    "
SEARCHES: list[dict[str, Any]] = [
    {"n": 4, "max_tokens": 24, "length_penalty": 1.0, "early_stopping": False},
    {"n": 2, "best_of": 3, "max_tokens": 17, "length_penalty": 2.0, "early_stopping": "never"},
]
LONG: dict[str, Any] = {"n": 3, "max_tokens": 400, "early_stopping": "never", "ignore_eos": True}


def searched(body: dict[str, Any]) -> list[list[int]]:
    """The output tokens of transformers' hypotheses, best first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(DEFAULT_MODEL)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        found = model.generate(
            prompt,
            num_beams=body.get("best_of", body["n"]),
            num_return_sequences=body["n"],
            max_new_tokens=body["max_tokens"],
            length_penalty=body["length_penalty"],
            early_stopping=body["early_stopping"],
            do_sample=False,
            pad_token_id=0,
        )
    return [tokens[prompt.shape[1] :] for tokens in found.tolist()]


async def ask(client: Client, body: dict[str, Any]) -> list[list[int]]:
    answer = await client.complete(
        prompt=PROMPT, use_beam_search=True, temperature=0, return_token_ids=True, **body
    )
    assert answer.error is None, answer.error
    return [choice["token_ids"] for choice in answer.chunks[0]["choices"]]


def holder(fleet: Fleet) -> Process:
    """The decode node that searches."""

    def found() -> list[Process]:
        return [p for p in fleet.role("decode") if p.metrics()['baton_blocks{state="running"}']]

    wait_until(lambda: bool(found()), "a decode node searches")
    return found()[0]


def test_hypotheses_are_those_of_transformers_and_survive_their_node(
    make_fleet: MakeFleet,
) -> None:
    fleet = make_fleet().start(decode=2)

    async def scenario() -> None:
        async with Client(fleet.url) as client:
            for body in SEARCHES:
                ours = await ask(client, body)
                for found, expected in zip(ours, searched(body), strict=True):
                    assert found == expected[: len(found)]
                    assert not any(expected[len(found) :])
            undisturbed = await ask(client, LONG)
            again = asyncio.create_task(ask(client, LONG))
            victim = await asyncio.to_thread(holder, fleet)
            fleet.kill(victim.name)
            assert await again == undisturbed
            left = asyncio.create_task(ask(client, LONG))  # by its client, in the middle
            await asyncio.to_thread(holder, fleet)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)

    asyncio.run(scenario())
    fleet.assert_balanced()
