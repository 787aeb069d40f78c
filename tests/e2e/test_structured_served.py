"""Structured output from real nodes: valid whatever the model would say, and after a kill."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.test_faults import num_moved, until_busy

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LONG = {"regex": "([a-z]{4} ){40}"}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, "strict": True}}


def check_person(text: str) -> None:
    value = json.loads(text)
    assert set(value) == set(PERSON["properties"])
    assert len(value["name"]) <= 30
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"red", "green"}


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_it_is_valid(make_fleet: MakeFleet) -> None:
    """The first token comes from the prefill node, the others from the decode node."""
    fleet = make_fleet().start()

    async def ask() -> list[Answer]:
        async with Client(fleet.url) as client:
            common: dict[str, Any] = {
                "prompt": "Tell me about yourself: ",
                "max_tokens": 400,
                "logprobs": 2,
            }
            asked = [
                client.stream(
                    **common,
                    seed=seed,
                    temperature=temperature,
                    response_format=schema(PERSON),
                )
                for seed, temperature in ((1, 0.0), (2, 0.8), (3, 2.0), (4, 1.0))
            ]
            asked += [
                client.stream(**common, structured_outputs={"choice": ["maybe so", "no, never"]}),
                client.stream(**common, structured_outputs={"regex": "[0-9]{3}-[a-f]{2}"}),
                client.stream(
                    path="/v1/chat/completions",
                    messages=[{"role": "user", "content": "Who?"}],
                    max_tokens=400,
                    response_format=schema(PERSON),
                ),
                client.complete(
                    prompt="Who? ", n=4, max_tokens=400, seed=7, response_format=schema(PERSON)
                ),
            ]
            return list(await asyncio.gather(*asked))

    *people, choice, pattern, chat, several = asyncio.run(ask())
    for answer in [*people, choice, pattern, chat, several]:
        assert (answer.status, answer.error, answer.finish_reason) == (200, None, "stop")
    for answer in [*people, chat]:
        check_person(answer.text)
    for one in several.chunks[0]["choices"]:
        check_person(one["text"])
    assert choice.text in ("maybe so", "no, never")
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", pattern.text)
    tops = [top for chunk in people[0].chunks for top in _tops(chunk)]
    assert any(min(top.values()) > -5 and len(top) > 2 for top in tops)  # it would rather say more
    fleet.assert_balanced()


def _tops(chunk: dict[str, Any]) -> list[dict[str, float]]:
    return [
        top
        for choice in chunk["choices"]
        for top in (choice["logprobs"] or {}).get("top_logprobs", [])
    ]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_it_stays_valid_when_a_decode_node_dies(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(prefill=1, decode=2)

    async def ask() -> list[Answer]:
        async with Client(fleet.url) as client:
            streams = [
                asyncio.ensure_future(
                    client.stream(
                        prompt=f"Words number {index}: ",
                        max_tokens=500,
                        seed=index,
                        structured_outputs=LONG,
                    )
                )
                for index in range(8)
            ]
            await until_busy(fleet, "decode-0", 40)
            fleet.kill("decode-0")
            return await asyncio.gather(*streams)

    answers = asyncio.run(ask())
    assert num_moved(fleet) > 0, "the node died too late to disturb anybody"
    for answer in answers:
        assert (answer.error, answer.finish_reason) == (None, "stop")
        assert re.fullmatch(LONG["regex"], answer.text)
    fleet.assert_balanced()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_what_only_a_node_can_tell_is_a_400(make_fleet: MakeFleet) -> None:
    """A grammar may name special tokens, which the router does not know by number."""
    fleet = make_fleet().start()

    async def ask() -> tuple[Answer, Answer, Answer]:
        async with Client(fleet.url) as client:
            grammar = {"grammar": "start: <[999999]>"}
            bad = await client.complete(prompt="x", max_tokens=5, structured_outputs=grammar)
            first = await client.complete(prompt="x", max_tokens=1, structured_outputs=grammar)
            good = await client.complete(prompt="x", guided_choice=["a"])
            return bad, first, good

    bad, first, good = asyncio.run(ask())
    assert (bad.status, first.status) == (400, 400)
    assert good.text == "a"
    fleet.assert_balanced()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_required_tool_calls(make_fleet: MakeFleet) -> None:
    """A model that has never seen a tool calls one, with arguments that fit."""
    fleet = make_fleet().start()
    tool = {"type": "function", "function": {"name": "enrol", "parameters": PERSON}}

    async def ask() -> Answer:
        async with Client(fleet.url) as client:
            return await client.stream(
                path="/v1/chat/completions",
                messages=[{"role": "user", "content": "Who?"}],
                max_tokens=600,
                seed=3,
                tools=[tool],
                tool_choice="required",
                parallel_tool_calls=False,
            )

    answer = asyncio.run(ask())
    assert (answer.error, answer.finish_reason) == (None, "tool_calls")
    deltas = [c["delta"] for chunk in answer.chunks for c in chunk["choices"]]
    calls = [call["function"] for delta in deltas for call in delta.get("tool_calls", [])]
    assert calls[0]["name"] == "enrol"
    check_person("".join(call["arguments"] for call in calls))
    fleet.assert_balanced()
