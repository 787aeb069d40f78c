"""Tools over HTTP: what the model is told, what the client gets, streamed and whole."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from llguidance import LLTokenizer

from router.tools.choose import FORMATS, call_format
from router.tools.parsers import TaggedParser, WholeParser
from tests.router import tiny_tokenizer
from tests.router.harness import MODEL, Answer, Harness, endless, router, saying
from wire.grammar import new_matcher
from wire.request_messages import Prefill

BYTES = LLTokenizer("byte")


@pytest.fixture(autouse=True)
def _room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters are tokens here, and tools are told in many."""
    monkeypatch.setattr("tests.router.harness.MODEL", replace(MODEL, max_model_len=8192))


def tool(name: str = "weather", **parameters: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"c": {"enum": ["Bern", "Rome"]}},
        **parameters,
    }
    function = {"name": name, "description": "Tells", "parameters": schema, "strict": True}
    return {"type": "function", "function": function}


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
ARGUMENTS = {"city": "Bern"}


def prompt_of(harness: Harness) -> str:
    tokens = list(harness.sent(Prefill)[-1].tokens)
    return str(tiny_tokenizer.build().decode(tokens, skip_special_tokens=False))


def gathered(answer: Answer) -> tuple[dict[str, Any], str]:
    """A streamed message put together as OpenAI's clients do, and its finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = ""
    for event in answer.events:
        for choice in event["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls", []):
                if call["index"] == len(message["tool_calls"]):
                    assert call["type"] == "function"
                    assert call["id"]
                    assert call["function"]["name"]
                    message["tool_calls"].append(call)
                else:
                    assert call["index"] == len(message["tool_calls"]) - 1
                    assert set(call) == {"index", "function"}
                    made = message["tool_calls"][-1]["function"]
                    made["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, reason


async def ask(harness: Harness, stream: bool, **fields: Any) -> tuple[dict[str, Any], str]:
    answer = await harness.chat(stream=stream, max_tokens=300, **fields)
    assert answer.status == 200, answer.body
    if stream:
        return gathered(answer)
    (choice,) = answer.json["choices"]
    return choice["message"], choice["finish_reason"]


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    made = [call["function"] for call in message.get("tool_calls", [])]
    return [(call["name"], json.loads(call["arguments"])) for call in made]


@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_text(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying(f"I look.\n{CALL}\n{CALL}")) as harness:
            message, reason = await ask(harness, stream, tools=[tool()])
            assert message["content"] == "I look."
            assert calls_of(message) == [("weather", ARGUMENTS)] * 2
            assert len({call["id"] for call in message["tool_calls"]}) == 2
            assert reason == "tool_calls"
            assert '"name": "weather"' in prompt_of(harness)
            message, reason = await ask(harness, stream)
            assert message["content"] == f"I look.\n{CALL}\n{CALL}"
            message, reason = await ask(harness, stream, tools=[tool()], tool_choice="none")
            assert reason == "stop"
            assert "weather" not in prompt_of(harness)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_only_calls_and_cut_calls(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying(CALL)) as harness:
            message, _ = await ask(harness, stream, tools=[tool()])
            assert not message["content"]
            cut = {"tools": [tool()], "max_completion_tokens": 40}
            message, reason = await ask(harness, stream, **cut)
            assert (message["content"], reason) == (CALL[:40], "length")
            assert not calls_of(message)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_with_logprobs_of_every_token(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying(CALL)) as harness:
            answer = await harness.chat(
                stream=stream, max_tokens=300, n=3, tools=[tool()], return_token_ids=True
            )
            if not stream:
                for choice in answer.json["choices"]:
                    assert choice["finish_reason"] == "tool_calls"
                    assert len(choice["token_ids"]) == len(CALL) + 1
                return
            ids: dict[int, list[int]] = {}
            for event in answer.events:
                for choice in event["choices"]:
                    ids.setdefault(choice["index"], []).extend(choice.get("token_ids", []))
            assert [len(ids[index]) for index in range(3)] == [len(CALL) + 1] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls(stream: bool) -> None:
    text = '[{"name": "weather", "parameters": {"city": "Bern"}}]'
    two = text[:-1] + ', {"name": "other", "parameters": {"city": "Rome"}}]'

    def fits(harness: Harness, text: str) -> bool:
        matcher = new_matcher(BYTES, harness.sent(Prefill)[-1].sampling.grammar)
        return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()

    async def scenario() -> None:
        async with router(saying(text)) as harness:
            asked = {"tools": [tool(), tool("other")], "tool_choice": "required"}
            message, reason = await ask(harness, stream, **asked)
            assert (calls_of(message), reason) == ([("weather", ARGUMENTS)], "tool_calls")
            assert not message["content"]
            assert fits(harness, text)
            assert fits(harness, two)
            assert not fits(harness, text.replace("Bern", "Oslo"))
            assert not fits(harness, text.replace("weather", "whether"))
            assert not fits(harness, "[]")
            await ask(harness, stream, **asked, parallel_tool_calls=False)
            assert fits(harness, text)
            assert not fits(harness, two)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_call(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying('{"city": "Bern"}')) as harness:
            named = {"type": "function", "function": {"name": "weather"}}
            message, reason = await ask(harness, stream, tools=[tool()], tool_choice=named)
            assert (calls_of(message), reason) == ([("weather", ARGUMENTS)], "stop")
            assert harness.sent(Prefill)[-1].sampling.grammar

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(stream: bool) -> None:
    async def scenario() -> None:
        script = saying(f"<think>\nHm.\n</think>\n\nSo: {CALL}")
        async with router(script, reasoning_parser="think") as harness:
            message, _ = await ask(harness, stream, tools=[tool()])
            assert (message["reasoning_content"], message["content"]) == ("Hm.", "So:")
            assert calls_of(message) == [("weather", ARGUMENTS)]
        async with router(saying("a <think>b")) as harness:
            message, _ = await ask(harness, stream)
            assert message["content"] == "a <think>b"

    asyncio.run(scenario())


def test_a_conversation_with_calls() -> None:
    made = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]

    async def scenario() -> None:
        async with router(endless) as harness:
            body = {"messages": talk, "tools": [tool()], "max_tokens": 2}
            assert (await harness.post("/v1/chat/completions", body)).status == 200
            prompt = prompt_of(harness)
            assert prompt.startswith("<|system|>Be brief.\n\nYou may call functions.")
            assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in prompt
            assert "<|tool|>42" in prompt

    asyncio.run(scenario())


MANY_CALLS = '[{"name": "weather", "parameters": {"city": "Bern"}}'


@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_that_a_limit_cuts(stream: bool) -> None:
    """What is told is told as calls, the last one with what there is of its arguments."""

    async def scenario() -> None:
        async with router(saying(f"{MANY_CALLS}, {MANY_CALLS[1:]}]")) as harness:
            asked: dict[str, Any] = {"tools": [tool()], "tool_choice": "required"}
            whole, part = len(MANY_CALLS), '{"city": "B'
            for limit, told in ((whole, ['{"city": "Bern"}']), (whole - 6, [part]), (whole + 5, 1)):
                answer = await harness.chat(stream=stream, max_completion_tokens=limit, **asked)
                if stream:
                    message, reason = gathered(answer)
                else:
                    (choice,) = answer.json["choices"]
                    message, reason = choice["message"], choice["finish_reason"]
                assert (message["content"] or "", reason) == ("", "length")
                arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
                assert arguments == told if isinstance(told, list) else len(arguments) == told

    asyncio.run(scenario())


def test_undeclared_arguments_are_not_invented() -> None:
    closed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    opened = {**closed, "additionalProperties": True}

    async def grammar(parameters: dict[str, Any]) -> str:
        async with router(endless) as harness:
            function = {"type": "function", "function": {"name": "f", "parameters": parameters}}
            named = {"type": "function", "function": {"name": "f"}}
            await harness.chat(max_tokens=1, tools=[function], tool_choice=named)
            return str(harness.sent(Prefill)[-1].sampling.grammar)

    def takes(grammar: str, text: str) -> bool:
        return new_matcher(BYTES, grammar).consume_tokens(list(text.encode()))

    assert takes(asyncio.run(grammar(closed)), '{"a": 1}')
    assert not takes(asyncio.run(grammar(closed)), '{"b": 1}')
    assert takes(asyncio.run(grammar(opened)), '{"b": 1}')


@pytest.mark.parametrize("stream", [False, True])
def test_strict_calls_keep_to_their_schemas(stream: bool) -> None:
    """Where they need not be made; and one of a tool that is not strict takes any object."""
    loose = tool("other")
    loose["function"]["strict"] = False
    other = CALL.replace("weather", "other").replace("city", "town")

    async def scenario() -> None:
        async with router(saying(f"So: {CALL}"), tool_call_parser="hermes") as harness:
            message, _ = await ask(harness, stream, tools=[tool(), loose])
            assert message["content"] == "So:"
            assert calls_of(message) == [("weather", ARGUMENTS)]
            matcher = new_matcher(BYTES, harness.sent(Prefill)[-1].sampling.grammar)
            for text, fits in (
                ("just text", True),
                (f"So: {CALL}", True),
                (f"{CALL}\n{other} and", True),
                (CALL.replace("Bern", "Oslo"), False),
                (CALL.replace("city", "town"), False),
                ("<tool_call>no", False),
            ):
                copy = matcher.deep_copy()
                taken = copy.consume_tokens(list(text.encode())) and copy.is_accepting()
                assert taken is fits, text
            await ask(harness, stream, tools=[loose])
            assert not harness.sent(Prefill)[-1].sampling.grammar
        async with router(saying("x"), tool_call_parser="mistral") as harness:
            await ask(harness, stream, tools=[tool()])
            assert not harness.sent(Prefill)[-1].sampling.grammar

    asyncio.run(scenario())


def test_refusals() -> None:
    named = {"type": "function", "function": {"name": "none"}}
    bad_schema = tool(properties={"city": {"type": "nonsense"}})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [tool("a b")]}, "tools.0.function.name"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": named}, "tool_choice"),
        ({"tools": [bad_schema], "tool_choice": "required"}, "tools"),
        ({"tools": [tool()], "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [tool()], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ]
    turns: list[dict[str, Any]] = [
        {"role": "assistant"},
        {"role": "tool", "content": "x"},
        {"role": "user", "content": "x", "tool_call_id": "1"},
        {"role": "user", "content": "x", "reasoning_content": "hm"},
    ]

    async def scenario() -> None:
        async with router(endless) as harness:
            for fields, param in cases:
                answer = await harness.chat(max_tokens=1, **fields)
                assert answer.status == 400, fields
                assert answer.error["param"] == param, answer.error
            for turn in turns:
                answer = await harness.post("/v1/chat/completions", {"messages": [turn]})
                assert answer.status == 400, turn
            assert not harness.sent(Prefill)

    asyncio.run(scenario())


def test_formats_by_template() -> None:
    assert call_format("auto", "") is FORMATS["hermes"]
    assert call_format("auto", "… [TOOL_CALLS] …") is FORMATS["mistral"]
    assert call_format("auto", "role == 'ipython'") is FORMATS["llama3_json"]
    assert call_format("pythonic", "[TOOL_CALLS]") is FORMATS["pythonic"]
    assert isinstance(FORMATS["hermes"].make(), TaggedParser)
    assert isinstance(FORMATS["llama3_json"].make(), WholeParser)
