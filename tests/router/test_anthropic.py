"""Anthropic's API, asked by Anthropic's own client: streamed and whole, tools, errors, counting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anthropic
import pytest

from tests.router import tiny_tokenizer
from tests.router.harness import MODEL, Harness, alphabet, endless, router, saying
from wire.request_messages import Prefill

USER: list[Any] = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "name": "weather",
    "description": "Tells",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Bern", "Rome"]}},
        "required": ["city"],
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>'


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters are tokens here, and tools are told in many."""
    monkeypatch.setattr("tests.router.harness.MODEL", replace(MODEL, max_model_len=8192))


Scenario = Callable[[Harness, anthropic.AsyncAnthropic], Awaitable[None]]


def run(script: Any, scenario: Scenario, **options: Any) -> None:
    async def start() -> None:
        async with (
            router(script, **options) as harness,
            anthropic.AsyncAnthropic(
                base_url=harness.url, api_key="none", max_retries=0, timeout=60
            ) as client,
        ):
            await scenario(harness, client)

    asyncio.run(start())


async def create(client: anthropic.AsyncAnthropic, stream: bool, **fields: Any) -> Any:
    """The final message, put together by the client where it was streamed."""
    fields = {"model": "stub", "max_tokens": 200, "messages": USER, **fields}
    if not stream:
        return await client.messages.create(**fields)
    async with client.messages.stream(**fields) as events:
        async for _ in events:
            pass
        return await events.get_final_message()


def prompt_of(harness: Harness) -> str:
    tokens = list(harness.sent(Prefill)[-1].tokens)
    return str(tiny_tokenizer.build().decode(tokens, skip_special_tokens=False))


@pytest.mark.parametrize("stream", [False, True])
def test_text(stream: bool) -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        system: Any = [
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
        ]
        more = {"temperature": 0.5, "top_k": 3}  # the client knows them no more
        message = await create(client, stream, system=system, extra_body=more)
        assert (message.role, message.stop_reason, message.stop_sequence) == (
            "assistant",
            "end_turn",
            None,
        )
        assert [block.text for block in message.content] == ["Grüezi"]
        assert prompt_of(harness) == "<|system|>Be brief.</s><|user|>hi</s><|assistant|>"
        assert message.usage.output_tokens == len("Grüezi".encode()) + 1
        assert message.usage.input_tokens > 0
        sampling = harness.sent(Prefill)[-1].sampling
        assert (sampling.temperature, sampling.top_k) == (0.5, 3)

    run(saying("Grüezi"), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_ends(stream: bool) -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        message = await create(client, stream, max_tokens=5)
        assert (message.content[0].text, message.stop_reason) == (alphabet(5), "max_tokens")
        message = await create(client, stream, stop_sequences=["zz", "def"])
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "def")
        assert message.content[0].text == "abc"

    run(endless, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_calls(stream: bool) -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        message = await create(client, stream, tools=[TOOL])
        first, *calls = message.content
        assert (first.type, first.text) == ("text", "I look:")
        assert [(call.type, call.name, call.input) for call in calls] == [
            ("tool_use", "weather", {"city": "Bern"})
        ] * 2
        assert calls[0].id != calls[1].id
        assert message.stop_reason == "tool_use"
        assert '"name": "weather"' in prompt_of(harness)

    run(saying(f"I look: {CALL} {CALL}"), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be(stream: bool) -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        choice = {"type": "tool", "name": "weather"}
        message = await create(client, stream, tools=[TOOL], tool_choice=choice)
        (call,) = message.content
        assert (call.name, call.input) == ("weather", {"city": "Rome"})
        assert message.stop_reason == "tool_use"
        assert harness.sent(Prefill)[-1].sampling.grammar

    run(saying('{"city": "Rome"}'), scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(stream: bool) -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        message = await create(client, stream)
        thought, said = message.content
        assert (thought.type, thought.thinking, said.text) == ("thinking", "Hm.", "Yes")

    run(saying("<think>Hm.</think>Yes"), scenario, reasoning_parser="think")


def test_a_conversation_with_results_and_a_beginning_of_the_answer() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": "rain", "is_error": False}
    talk: list[Any] = [
        *USER,
        {"role": "assistant", "content": [{"type": "text", "text": "I look"}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "well?"}]},
        {"role": "assistant", "content": "It"},
    ]

    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        await create(client, False, messages=talk, max_tokens=1)
        called = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
        assert prompt_of(harness) == (
            f"<|user|>hi</s><|assistant|>I look\n{called}</s><|tool|>rain</s>"
            "<|user|>well?</s><|assistant|>It"
        )

    run(endless, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output(stream: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}

    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        message = await create(client, stream, extra_body=wanted)
        assert message.content[0].text == '{"a": 1}'
        grammar = harness.sent(Prefill)[-1].sampling.grammar
        assert '"required":["a"]' in grammar.replace(" ", "")

    run(saying('{"a": 1}'), scenario)


def test_counting() -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        message = await create(client, False, system="Be brief.")
        counted = await client.messages.count_tokens(
            model="stub", messages=USER, system="Be brief."
        )
        usage = message.usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens

    run(endless, scenario)


def test_events_come_in_their_order() -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        body = {"model": "stub", "max_tokens": 200, "messages": USER, "stream": True}
        answer = await harness.post("/v1/messages", {**body, "tools": [TOOL]})
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        kinds, block = [], -1
        for part in answer.body.decode().split("\n\n")[:-1]:
            event, data = part.split("\n")
            content = json.loads(data.removeprefix("data: "))
            assert event == f"event: {content['type']}"
            kinds.append(content["type"])
            if content["type"] == "content_block_start":
                block += 1
            if "index" in content:
                assert content["index"] == block
        deltas = [kind for kind in kinds if kind != "content_block_delta"]
        assert deltas == [
            "message_start",
            *["content_block_start", "content_block_stop"] * 2,
            "message_delta",
            "message_stop",
        ]

    run(saying(f"So {CALL}"), scenario)


def test_errors_have_their_shape() -> None:
    cases: list[tuple[dict[str, Any], type[anthropic.APIStatusError], str]] = [
        ({"max_tokens": 0}, anthropic.BadRequestError, "max_tokens"),
        ({"model": "nobody"}, anthropic.NotFoundError, "nobody"),
        ({"messages": []}, anthropic.BadRequestError, "messages"),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2000}},
            anthropic.BadRequestError,
            "thin",
        ),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "temperature"),
        ({"max_tokens": 10_000_000}, anthropic.BadRequestError, "context length"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, anthropic.BadRequestError, "name"),
        ({"extra_body": {"echo": True}}, anthropic.BadRequestError, "echo"),
    ]

    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        for fields, kind, message in cases:
            with pytest.raises(kind) as caught:
                await create(client, False, **fields)
            body: Any = caught.value.body
            assert body["type"] == "error"
            assert message in body["error"]["message"], fields
            assert body["request_id"] == caught.value.request_id
        assert not harness.sent(Prefill)

    run(endless, scenario)


def test_no_nodes() -> None:
    async def scenario(harness: Harness, client: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await create(client, False)
        body: Any = caught.value.body
        assert (caught.value.status_code, body["error"]["type"]) == (503, "overloaded_error")

    run(None, scenario)
