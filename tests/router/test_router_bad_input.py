"""Whatever a client sends: the right 4xx in OpenAI's shape, nothing taken, the process lives."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router.errors import MAX_MESSAGE_CHARS
from tests.router.harness import Answer, endless, router
from wire.request_messages import Prefill, Reserve

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]

# (fields beside a valid prompt, the parameter that the error names)
BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**9]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"model": 5}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": False}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"seed": 1 << 64}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"metadata": 5}, "metadata"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "x"}, "suffix"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": True}, "best_of"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"priority": 1.5}, "priority"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"store": True}, "store"),
    ({"messages": []}, "messages"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"use_beam_search": 1}, "use_beam_search"),
    ({"use_beam_search": True, "n": 33}, "n"),
    ({"use_beam_search": True, "stream": True}, "stream"),
    ({"use_beam_search": True, "temperature": 0.5}, "temperature"),
    ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
    ({"use_beam_search": True, "logit_bias": {"5": 1}}, "logit_bias"),
    ({"use_beam_search": True, "stop": "x"}, "stop"),
    ({"use_beam_search": True, "prompt_logprobs": 0}, "prompt_logprobs"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ({"use_beam_search": True, "early_stopping": "always"}, "early_stopping"),
    ({"use_beam_search": True, "guided_choice": ["a"]}, "guided_choice"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"early_stopping": "never"}, "early_stopping"),
    ({"n": 129}, "n"),
    ({"temprature": 1}, "temprature"),
    ({"x" * 5000: 1}, "x" * 99 + "…"),
]

BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [5]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [*USER, {"role": "user", "content": []}]}, "messages.1.content"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "messages.0.tool_calls.0.id",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "messages.0.content.0.type",
    ),
    ({"messages": [*USER, {"role": "system", "content": "late"}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 5}, "top_logprobs"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"chat_template": "{{ messages }}"}, "chat_template"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prompt": "x"}, "prompt"),
]

NEUTRAL: list[dict[str, Any]] = [
    {"logprobs": None, "echo": False, "suffix": None, "best_of": 1},
    {"best_of": 2, "n": 2},
    {"response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}},
    {"logprobs": 0, "priority": 0, "service_tier": "auto", "store": False},
    {"spaces_between_special_tokens": False, "include_stop_str_in_output": False},
    {"use_beam_search": False, "length_penalty": 1, "skip_special_tokens": True},
    dict.fromkeys(("n", "stop", "seed", "top_p", "max_tokens", "stream", "logit_bias")),
]


def check_error(answer: Answer, status: int, param: str | None = None) -> dict[str, Any]:
    assert answer.status == status, answer.body
    assert answer.headers["Content-Type"].startswith("application/json")
    assert set(answer.json) == {"error"}
    error: dict[str, Any] = answer.error
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) <= MAX_MESSAGE_CHARS
    if param is not None:
        assert error["param"] == param, error
    return error


def test_bad_fields() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields, param in BAD_FIELDS:
                check_error(await harness.complete(**fields), 400, param)
            for fields, param in BAD_CHAT:
                check_error(await harness.post(CHAT, {"messages": USER, **fields}), 400, param)
            assert harness.sent(Reserve) == harness.sent(Prefill) == []
            assert (await harness.complete()).status == 200

    asyncio.run(scenario())


def test_neutral_values_of_unsupported_fields_pass() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields in NEUTRAL:
                answer = await harness.complete(**fields)
                assert answer.status == 200, answer.body
            echoed = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": None}
            chat = {"messages": [*USER, echoed, *USER], "tools": [], "max_tokens": 1}
            assert (await harness.post(CHAT, chat)).status == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x"} trailing',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bad_bodies(body: bytes) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            check_error(await harness.post(COMPLETIONS, body), 400)
            check_error(await harness.post(CHAT, body), 400)
            assert (await harness.get("/health")).status == 200

    asyncio.run(scenario())


def test_unknown_model_route_and_method() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            error = check_error(await harness.complete(model="gpt-9"), 404, "model")
            assert error["code"] == "model_not_found"
            check_error(await harness.post("/v1/nothing", {}), 404)
            check_error(await harness.get("/nothing"), 404)
            answer = await harness.get(COMPLETIONS)
            check_error(answer, 405)
            assert "POST" in answer.headers["Allow"]
            async with harness.session.options(harness.url + CHAT) as response:
                assert response.status == 405
            async with harness.session.head(harness.url + "/metrics") as response:
                assert response.status == 200

    asyncio.run(scenario())


def test_context_length() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            too_long = [
                await harness.complete(prompt="x" * 512),
                await harness.complete(prompt="x" * 511, max_tokens=2),
                await harness.complete(prompt=[1] * 5000),
                await harness.chat("x" * 600),
                await harness.complete(max_tokens=1 << 30),
                await harness.complete(prompt="x" * 512, stream=True),
            ]
            for answer in too_long:
                error = check_error(answer, 400)
                assert error["code"] == "context_length_exceeded"
                assert "maximum context length is 512 tokens" in error["message"]
            assert (await harness.complete(prompt="x" * 511)).json["usage"]["total_tokens"] == 512

    asyncio.run(scenario())


def test_body_over_the_limit() -> None:
    async def scenario() -> None:
        async with router(endless, max_body_bytes=10_000) as harness:
            check_error(await harness.complete(prompt="x" * 20_000), 413)
            assert (await harness.complete(prompt="x" * 100)).status == 200

    asyncio.run(scenario())


def test_a_body_that_never_ends_is_given_up() -> None:
    async def scenario() -> None:
        async with router(endless, body_timeout_s=0.1) as harness:
            host, port = harness.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            assert (await reader.readline()).startswith(b"HTTP/1.1 408")
            writer.close()
            await writer.wait_closed()

    asyncio.run(scenario())


def test_error_texts_do_not_echo_a_long_input() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields in ({"model": "m" * 100_000}, {"stop": ["s" * 100_000]}, {"a" * 100_000: 1}):
                answer = await harness.complete(**fields)
                assert answer.status in (400, 404)
                assert len(answer.body) < 1000
            many = {f"unknown{number}": 1 for number in range(10_000)}
            assert len((await harness.complete(**many)).body) < 1000
            body = json.dumps({"messages": [{"role": 1}] * 10_000}).encode()
            assert len((await harness.post(CHAT, body)).body) < 1000

    asyncio.run(scenario())
