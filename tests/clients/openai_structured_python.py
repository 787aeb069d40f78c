"""The `openai` package, both majors: parsed answers, required calls, Responses and their state.

The bundled model is small: what is asked for is structure, which a grammar guarantees.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
from pydantic import BaseModel

from tests.clients.cases import MESSAGES, Servers, main

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 200}
SHORT: dict[str, Any] = {"temperature": 0, "max_output_tokens": 200}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Tells the weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "metric": {"type": "boolean"}},
        "required": ["city", "metric"],
        "additionalProperties": False,
    },
}


class Person(BaseModel):
    """What the bundled model cannot say unless a grammar makes it."""

    is_tall: bool
    kind: Literal["child", "grown"]


def client(servers: Servers) -> Any:
    return openai.OpenAI(base_url=servers.base, api_key="none", max_retries=0)


def check_arguments(arguments: str) -> None:
    value = json.loads(arguments)
    assert value["city"] in ("Oslo", "Rome")
    assert isinstance(value["metric"], bool)


def chat_is_parsed(servers: Servers) -> None:
    ask = {"model": servers.model, "messages": MESSAGES, **GREEDY, "response_format": Person}
    with client(servers) as api:
        whole = api.chat.completions.parse(**ask).choices[0].message.parsed
        assert isinstance(whole, Person)
        with api.chat.completions.stream(**ask) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == whole


def a_required_call_is_made(servers: Servers) -> None:
    ask = {"model": servers.model, "messages": MESSAGES, **GREEDY, "tool_choice": "required"}
    ask |= {"tools": [{"type": "function", "function": WEATHER}], "parallel_tool_calls": False}
    with client(servers) as api:
        (call,) = api.chat.completions.create(**ask).choices[0].message.tool_calls
        check_arguments(call.function.arguments)
        with api.chat.completions.stream(**ask) as stream:
            kinds = {event.type for event in stream}
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
        assert "tool_calls.function.arguments.delta" in kinds
        assert streamed.function.arguments == call.function.arguments


def responses_streamed_or_not(servers: Servers) -> None:
    ask = {"model": servers.model, "input": "Write a function.", **SHORT, "max_output_tokens": 16}
    with client(servers) as api:
        whole = api.responses.create(**ask)
        assert whole.output_text
        *_, last = api.responses.create(**ask, stream=True)
        assert last.type == f"response.{whole.status}"
        assert last.response.output_text == whole.output_text
        assert last.response.usage.output_tokens == whole.usage.output_tokens


def responses_are_parsed(servers: Servers) -> None:
    ask = {"model": servers.model, "input": "Who?", **SHORT, "text_format": Person}
    with client(servers) as api:
        whole = api.responses.parse(**ask).output_parsed
        assert isinstance(whole, Person)
        with api.responses.stream(**ask) as stream:
            assert stream.get_final_response().output_parsed == whole


def responses_go_on_after_a_call(servers: Servers) -> None:
    tools: Any = [{"type": "function", **WEATHER}]
    ask = {"model": servers.model, **SHORT, "tools": tools, "parallel_tool_calls": False}
    with client(servers) as api:
        with api.responses.stream(**ask, input="Rain?", tool_choice="required") as stream:
            kinds = {event.type for event in stream}
            first = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        check_arguments(first.output[0].arguments)
        outputs = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
            for call in first.output
        ]
        ask |= {"input": outputs, "previous_response_id": first.id, "max_output_tokens": 8}
        second = api.responses.create(**ask)
        assert second.usage.input_tokens > first.usage.input_tokens
        assert api.responses.retrieve(second.id).output_text == second.output_text
        api.responses.delete(first.id)
        try:
            api.responses.retrieve(first.id)
        except openai.NotFoundError:
            return
        raise AssertionError("it is still there")


CASES = [
    chat_is_parsed,
    a_required_call_is_made,
    responses_streamed_or_not,
    responses_are_parsed,
    responses_go_on_after_a_call,
]

if __name__ == "__main__":
    main(CASES)
