"""OpenAI's Responses, asked by OpenAI's own client: streamed and whole, tools, state, errors."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from router.access_config import AccessConfig
from router.place import Place
from router.responses.sqlite_store import SqliteStore
from router.responses.store import StoredResponse
from router.server import open_store
from tests.router import tiny_tokenizer
from tests.router.harness import (
    CONFIG,
    MODEL,
    Answer,
    Harness,
    alphabet,
    endless,
    eventually,
    router,
    saying,
)
from wire.request_messages import Prefill

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters are tokens here, and tools are told in many."""
    monkeypatch.setattr("tests.router.harness.MODEL", replace(MODEL, max_model_len=8192))


Scenario = Callable[[Harness, openai.AsyncOpenAI], Awaitable[None]]


def run(script: Any, scenario: Scenario, **options: Any) -> None:
    async def start() -> None:
        async with (
            router(script, **options) as harness,
            openai.AsyncOpenAI(
                base_url=f"{harness.url}/v1", api_key="none", max_retries=0, timeout=60
            ) as client,
        ):
            await scenario(harness, client)

    asyncio.run(start())


async def create(client: openai.AsyncOpenAI, stream: bool, **fields: Any) -> Any:
    """The final response, put together by the client where it was streamed."""
    fields = {"model": "stub", "input": "hi", **fields}
    if not stream:
        return await client.responses.create(**fields)
    async with client.responses.stream(**fields) as events:
        last = None
        async for event in events:
            last = event
        assert last is not None
        if last.type == "response.incomplete":
            return last.response
        return await events.get_final_response()


def prompt_of(harness: Harness) -> str:
    tokens = list(harness.sent(Prefill)[-1].tokens)
    return str(tiny_tokenizer.build().decode(tokens, skip_special_tokens=False))


def events_of(answer: Answer) -> list[dict[str, Any]]:
    """A stream's events, numbered from zero, each named as its content says."""
    found = []
    for part in answer.body.decode().split("\n\n")[:-1]:
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_text(stream: bool) -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(
            client,
            stream,
            instructions="Be brief.",
            temperature=0.5,
            metadata={"a": "b"},
            extra_body={"top_k": 3},
        )
        assert (response.object, response.status, response.error) == ("response", "completed", None)
        assert response.output_text == "Grüezi"
        (item,) = response.output
        assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
        assert prompt_of(harness) == "<|system|>Be brief.</s><|user|>hi</s><|assistant|>"
        usage = response.usage
        assert usage.output_tokens == len("Grüezi".encode()) + 1
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.input_tokens_details.cached_tokens == 0
        assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
        assert (response.temperature, response.top_p, response.tool_choice) == (0.5, 1.0, "auto")
        sampling = harness.sent(Prefill)[-1].sampling
        assert (sampling.temperature, sampling.top_k) == (0.5, 3)

    run(saying("Grüezi"), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_its_length_ends(stream: bool) -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, stream, max_output_tokens=5)
        assert (response.status, response.output_text) == ("incomplete", alphabet(5))
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output[0].status == "incomplete"

    run(endless, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_calls(stream: bool) -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, stream, tools=[TOOL])
        first, *calls = response.output
        assert first.content[0].text == "I look:"
        told = [(call.type, call.name, json.loads(call.arguments)) for call in calls]
        assert told == [("function_call", "weather", {"city": "Bern"})] * 2
        assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 2
        assert response.status == "completed"
        assert response.tools[0].name == "weather"
        assert '"name": "weather"' in prompt_of(harness)

    run(saying(f"I look: {CALL} {CALL}"), scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"type": "function", "name": "weather"}, '{"city": "Rome"}'),
        ("required", '[{"name": "weather", "parameters": {"city": "Rome"}}]'),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "weather"}],
            },
            '[{"name": "weather", "parameters": {"city": "Rome"}}]',
        ),
    ],
)
def test_a_call_that_must_be(stream: bool, choice: Any, said: str) -> None:
    other = {**TOOL, "name": "other"}

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, stream, tools=[TOOL, other], tool_choice=choice)
        (call,) = response.output
        assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
        grammar = harness.sent(Prefill)[-1].sampling.grammar
        assert grammar
        assert ("other" in grammar) == (choice == "required")

    run(saying(said), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(stream: bool) -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, stream)
        thought, said = response.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "Hm.")
        assert said.content[0].text == "Yes"

    run(saying("<think>Hm.</think>Yes"), scenario, reasoning_parser="think")


class Point(BaseModel):
    """What the answer must be."""

    x: int


def test_parsed_text() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await client.responses.parse(model="stub", input="hi", text_format=Point)
        assert response.output_parsed == Point(x=1)
        assert '"required":["x"]' in harness.sent(Prefill)[-1].sampling.grammar.replace(" ", "")
        async with client.responses.stream(model="stub", input="hi", text_format=Point) as events:
            kinds = [event.type async for event in events]
            assert (await events.get_final_response()).output_parsed == Point(x=1)
        assert "response.output_text.delta" in kinds

    run(saying('{"x": 1}'), scenario)


def test_events_come_in_their_order() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        body = {"input": "hi", "stream": True, "tools": [TOOL]}
        answer = await harness.post("/v1/responses", body)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = events_of(answer)
        kinds = [kind for kind, _ in itertools.groupby(event["type"] for event in events)]
        part = ["response.content_part.added", "DELTA", "DONE", "response.content_part.done"]
        item = ["response.output_item.added", "PARTS", "response.output_item.done"]
        expected = ["response.created", "response.in_progress"]
        for name in ("reasoning_text", "output_text"):
            told = [f"response.{name}.delta", f"response.{name}.done"]
            expected += [item[0], part[0], *told, part[-1], item[-1]]
        call = "response.function_call_arguments"
        expected += [item[0], f"{call}.delta", f"{call}.done", item[-1], "response.completed"]
        assert kinds == expected
        check_places(events)

    run(saying(f"<think>Hm</think>So {CALL}"), scenario, reasoning_parser="think")


def check_places(events: list[dict[str, Any]]) -> None:
    """Every event belongs to the item that is open; the pieces are the whole."""
    item: dict[str, Any] = {}
    done: list[dict[str, Any]] = []
    told = ""
    for event in events:
        if event["type"] == "response.output_item.added":
            item, told = event["item"], ""
            assert event["output_index"] == len(done)
            assert item["status"] == "in_progress"
        if "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (item["id"], len(done))
        told += event.get("delta", "")
        whole = event.get("text", event.get("arguments"))
        assert whole in (None, told)
        if event["type"] == "response.output_item.done":
            done.append(event["item"])
    assert events[-1]["response"]["output"] == done


def test_a_conversation_in_items() -> None:
    talk: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "Hm"}],
        },
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "I look", "annotations": []}],
        },
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "B"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
    ]

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        await create(client, False, input=talk, max_output_tokens=1, instructions="Be kind.")
        called = '<tool_call>\n{"name": "weather", "arguments": {"city": "B"}}\n</tool_call>'
        assert prompt_of(harness) == (
            "<|system|>Be kind.\n\nBe brief.</s><|user|>hi</s>"
            f"<|assistant|>I look\n{called}</s><|tool|>rain</s><|assistant|>"
        )

    run(endless, scenario)


# ------------------------------------------------------------ state


@pytest.mark.parametrize("stream", [False, True])
def test_one_goes_on_from_another(stream: bool) -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        first = await create(client, stream, instructions="Never carried over.")
        second = await create(client, stream, input="more", previous_response_id=first.id)
        third = await create(client, stream, input="end", previous_response_id=second.id)
        said = "<|assistant|>Yes</s>"
        assert prompt_of(harness) == (
            f"<|user|>hi</s>{said}<|user|>more</s>{said}<|user|>end</s><|assistant|>"
        )
        assert third.previous_response_id == second.id
        kept = await client.responses.retrieve(second.id)
        assert kept.to_dict() == second.to_dict() if not stream else kept.id == second.id
        items: Any = await client.responses.input_items.list(second.id)
        assert [item.content[0].text for item in items.data] == ["more"]
        await client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match=first.id) as caught:
            await create(client, stream, previous_response_id=third.id)
        assert caught.value.code == "previous_response_not_found"

    run(saying("Yes"), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_kept_before_its_end_is_told(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    put = SqliteStore._put

    def slowly(store: SqliteStore, stored: StoredResponse) -> None:
        time.sleep(0.3)
        put(store, stored)

    monkeypatch.setattr(SqliteStore, "_put", slowly)

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, stream)
        database = harness.server._store._database  # not behind what its thread still does
        found = database.execute("SELECT id FROM responses").fetchall()
        assert found == [(response.id,)]

    run(saying("Yes"), scenario)


def test_workers_share_what_they_keep(tmp_path: Path) -> None:
    """Without a file of the operator's: the next request may come to another worker."""

    async def scenario() -> None:
        stores = [
            open_store(replace(CONFIG, place=Place(index, tmp_path, (1, 2)))) for index in (0, 1)
        ]
        stored = StoredResponse("a", "", None, {}, [])
        await stores[0].put(stored)
        assert await stores[1].get("a", "") == stored
        for store in stores:
            await store.close()

    asyncio.run(scenario())


def test_what_is_not_stored_is_not_there() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, False, store=False)
        assert response.store is False
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        with pytest.raises(openai.BadRequestError):
            await create(client, False, previous_response_id=response.id)

    run(saying("Yes"), scenario)


def test_calls_and_results_are_kept() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        first = await create(client, True, tools=[TOOL])
        result = {
            "type": "function_call_output",
            "call_id": first.output[0].call_id,
            "output": "rain",
        }
        await create(client, True, input=[result], previous_response_id=first.id, tools=[TOOL])
        assert prompt_of(harness).endswith("</tool_call></s><|tool|>rain</s><|assistant|>")

    run(saying(CALL), scenario)


def test_input_items_come_in_pages() -> None:
    talk: list[Any] = [{"role": "user", "content": str(number)} for number in range(5)]

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, False, input=talk, max_output_tokens=1)
        listed: Any = client.responses.input_items.list(response.id, limit=2, order="asc")
        texts = [item.content[0].text async for item in listed]
        assert texts == ["0", "1", "2", "3", "4"]
        path = f"/v1/responses/{response.id}/input_items"
        first = (await harness.get(path)).json
        assert [item["content"][0]["text"] for item in first["data"]] == ["4", "3", "2", "1", "0"]
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=x", "include=y"):
            answer = await harness.get(f"{path}?{query}")
            assert (answer.status, answer.error["param"]) == (400, query.partition("=")[0])

    run(endless, scenario)


def test_owners_are_kept_apart(tmp_path: Path) -> None:
    keys = AccessConfig(api_keys=("mine", "yours"))

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        mine, yours = client.with_options(api_key="mine"), client.with_options(api_key="yours")
        response = await create(mine, False)
        assert (await mine.responses.retrieve(response.id)).id == response.id
        with pytest.raises(openai.NotFoundError):
            await yours.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            await yours.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError):
            await create(yours, False, previous_response_id=response.id)

    run(saying("Yes"), scenario, access=keys)


def test_a_file_outlives_the_router(tmp_path: Path) -> None:
    ids: list[str] = []

    async def before(harness: Harness, client: openai.AsyncOpenAI) -> None:
        ids.append((await create(client, True)).id)

    async def after(harness: Harness, client: openai.AsyncOpenAI) -> None:
        await create(client, False, input="more", previous_response_id=ids[0])
        assert prompt_of(harness).startswith("<|user|>hi</s><|assistant|>Yes</s><|user|>more")

    for scenario in (before, after):
        run(saying("Yes"), scenario, response_store=tmp_path / "responses")


def test_an_answer_that_cannot_be_kept_is_told_all_the_same() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        response = await create(client, True, input="x" * 200)
        assert response.output_text == "Yes"
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
        told = (await harness.get("/metrics")).body.decode()
        assert "baton_router_response_store_failures_total 1.0" in told

    run(saying("Yes"), scenario, response_store_bytes=300)


# ------------------------------------------------------------ limits and errors


def test_truncation_drops_the_oldest_turns() -> None:
    talk: list[Any] = [
        {"role": "system", "content": "Stay."},
        *({"role": "user", "content": f"{number} " + "x" * 3000} for number in range(4)),
        {"role": "user", "content": "last"},
    ]

    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        await create(client, False, input=talk, truncation="auto", max_output_tokens=10)
        prompt = prompt_of(harness)
        assert prompt.startswith("<|system|>Stay.</s><|user|>2 x")
        assert prompt.endswith("<|user|>last</s><|assistant|>")
        with pytest.raises(openai.BadRequestError) as caught:
            await create(client, False, input=talk, max_output_tokens=10)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")

    run(endless, scenario)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user"}]}, "input.0.content"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0",
    ),
    ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input.0.colour"),
    ({"background": True}, "background"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 100_000}, "input"),
    ({"temperature": 3.0}, "temperature"),
    ({"extra_body": {"top_k": -7}}, "top_k"),
    ({"extra_body": {"echo": True}}, "echo"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "y"}}}},
        "text.format.schema",
    ),
    ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ({"metadata": {"x": "y" * 600}}, "metadata.x"),
]


def test_refusals_name_the_field() -> None:
    async def scenario(harness: Harness, client: openai.AsyncOpenAI) -> None:
        for fields, param in REFUSED:
            for stream in (False, True):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.responses.create(
                        **{"model": "stub", "input": "hi", "stream": stream, **fields}
                    )
                assert caught.value.param == param, (fields, caught.value.body)
        with pytest.raises(openai.NotFoundError):
            await create(client, False, model="nobody")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve("resp_none")
        assert not harness.sent(Prefill)

    run(endless, scenario)


def test_a_failure_after_the_status_is_an_event() -> None:
    """The node dies in the middle, and there is no other."""

    async def scenario() -> None:
        async with router(endless, hold_headers_s=0.0, step_s=0.05) as harness:
            body = {"input": "hi", "stream": True, "max_output_tokens": 2000}
            asked = asyncio.ensure_future(harness.post("/v1/responses", body))
            await eventually(lambda: bool(harness.sent(Prefill)))
            await harness.pair.close()
            events = events_of(await asked)
            assert events[0]["type"] == "response.created"
            assert events[-1]["type"] == "response.failed"
            response = events[-1]["response"]
            assert (response["status"], response["error"]["code"]) == ("failed", "server_error")
            check_places(events)

    asyncio.run(scenario())
