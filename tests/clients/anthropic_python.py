"""The `anthropic` package: whole and streamed, tools, structured output, counting, errors."""

from __future__ import annotations

import json
from typing import Any

import anthropic

from tests.clients.cases import Servers, main

USER: list[Any] = [{"role": "user", "content": "Write a function that counts words."}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "metric": {"type": "boolean"}},
    "required": ["city", "metric"],
    "additionalProperties": False,
}
TOOL: Any = {"name": "weather", "description": "Tells the weather", "input_schema": SCHEMA}


def client(servers: Servers, **more: Any) -> anthropic.Anthropic:
    settings: dict[str, Any] = {"base_url": servers.open, "api_key": "none", "max_retries": 0}
    return anthropic.Anthropic(**(settings | more))


def asking(servers: Servers, **more: Any) -> dict[str, Any]:
    greedy = {"model": servers.model, "max_tokens": 16, "messages": USER}
    return greedy | {"extra_body": {"temperature": 0}} | more


def streamed_or_not(servers: Servers) -> None:
    with client(servers) as api:
        whole = api.messages.create(**asking(servers))
        with api.messages.stream(**asking(servers)) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert isinstance(whole.content[0], anthropic.types.TextBlock)
        assert text == whole.content[0].text
        assert final.usage.output_tokens == whole.usage.output_tokens
        counted = api.messages.count_tokens(model=servers.model, messages=USER)
        usage = whole.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def a_tool_that_must_be_used(servers: Servers) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    ask = asking(servers, tools=[TOOL], tool_choice=choice, max_tokens=200)
    with client(servers) as api:
        whole = api.messages.create(**ask)
        with api.messages.stream(**ask) as stream:
            final = stream.get_final_message()
        for message in (whole, final):
            (use,) = message.content
            assert isinstance(use, anthropic.types.ToolUseBlock)
            assert use.name == "weather"
            assert use.input["city"] in ("Oslo", "Rome")
            assert message.stop_reason == "tool_use"


def structured_output(servers: Servers) -> None:
    wanted = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    with client(servers) as api:
        message = api.messages.create(**asking(servers, extra_body=wanted, max_tokens=200))
        assert isinstance(message.content[0], anthropic.types.TextBlock)
        assert set(json.loads(message.content[0].text)) == {"city", "metric"}


def errors(servers: Servers) -> None:
    for kind, options, more in (
        (anthropic.NotFoundError, {}, {"model": "other"}),
        (anthropic.BadRequestError, {}, {"max_tokens": 10_000}),
        (anthropic.AuthenticationError, {"base_url": servers.guarded, "api_key": "wrong"}, {}),
    ):
        with client(servers, **options) as api:
            try:
                api.messages.create(**asking(servers, **more))
            except kind:
                continue
            raise AssertionError(f"no {kind.__name__}")


CASES = [streamed_or_not, a_tool_that_must_be_used, structured_output, errors]

if __name__ == "__main__":
    main(CASES)
