"""The `openai` package, in whichever major the environment has."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai

from tests.clients.cases import (
    MESSAGES,
    PROMPT,
    Servers,
    main,
    num_aborted,
    num_running,
    wait_until,
)

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
LONG: dict[str, Any] = {
    "temperature": 0,
    "max_tokens": 1500,
    "extra_body": {"ignore_eos": True},
}


def client(servers: Servers) -> Any:
    """Not typed: these calls must work with two majors whose stubs differ."""
    return openai.OpenAI(base_url=servers.base, api_key="none", max_retries=0)


def chat_text(stream: Any) -> dict[int, str]:
    """Text by choice; each choice must end exactly once."""
    texts: dict[int, str] = {}
    ended: list[int] = []
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.index not in ended, "something follows the end"
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason is not None:
                ended.append(choice.index)
    assert sorted(ended) == sorted(texts)
    return texts


# ---------------------------------------------------------------- answers


def models(servers: Servers) -> None:
    with client(servers) as api:
        (model,) = api.models.list().data
        assert model.id == servers.model
        assert api.models.retrieve(servers.model).max_model_len == servers.max_model_len


def completions_streamed_or_not(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "prompt": PROMPT, **GREEDY}
        whole = api.completions.create(**ask)
        assert whole.choices[0].text
        assert whole.usage.prompt_tokens + whole.usage.completion_tokens == whole.usage.total_tokens
        assert whole.usage.prompt_tokens_details.cached_tokens >= 0
        chunks = list(api.completions.create(**ask, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert len({chunk.id for chunk in chunks}) == 1


def several_prompts_and_token_ids(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, **GREEDY}
        both = api.completions.create(prompt=[PROMPT, "import os\n"], **ask)
        ids = api.completions.create(
            prompt=PROMPT, extra_body={"return_token_ids": True}, **ask
        ).choices[0]
        again = api.completions.create(prompt=ids.prompt_token_ids, **ask)
        assert [choice.index for choice in both.choices] == [0, 1]
        assert both.choices[0].text == again.choices[0].text == ids.text


def chat_streamed_or_not(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, **GREEDY}
        whole = api.chat.completions.create(**ask).choices[0]
        assert whole.message.role == "assistant"
        assert whole.message.content
        assert not whole.message.tool_calls
        assert chat_text(api.chat.completions.create(**ask, stream=True)) == {
            0: whole.message.content
        }


def the_stream_helper(servers: Servers) -> None:
    """The package's own accumulation of chunks into one answer."""
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, **GREEDY}
        text = api.chat.completions.create(**ask).choices[0].message.content
        stop = text[len(text) // 2 :][
            :4
        ]  # it takes an answer that was cut by its length for broken
        with api.chat.completions.stream(**ask, logprobs=True, stop=stop) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion().choices[0]
        assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
        assert final.message.content == text[: text.index(stop)]
        assert final.logprobs.content
        assert final.finish_reason == "stop"


def several_choices(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, "max_tokens": 12, "n": 2, "seed": 5}
        choices = api.chat.completions.create(**ask).choices
        assert [choice.index for choice in choices] == [0, 1]
        told = {choice.index: choice.message.content for choice in choices}
        assert told[0] != told[1]
        assert chat_text(api.chat.completions.create(**ask, stream=True)) == told


def developer_and_parts(servers: Servers) -> None:
    with client(servers) as api:
        parts = [{"type": "text", "text": "Write "}, {"type": "text", "text": "code."}]
        messages = [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": parts},
        ]
        answer = api.chat.completions.create(
            model=servers.model,
            messages=messages,
            max_completion_tokens=5,
            max_tokens=50,
            extra_body={"ignore_eos": True},
        )
        assert answer.usage.completion_tokens == 5


# ---------------------------------------------------------------- logprobs, stop, usage


def logprobs_of_chat(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, **GREEDY}
        ask |= {"logprobs": True, "top_logprobs": 3}
        choice = api.chat.completions.create(**ask).choices[0]
        entries = choice.logprobs.content
        for entry in entries:
            assert len(entry.top_logprobs) == 3
            assert entry.logprob == max(top.logprob for top in entry.top_logprobs), "greedy"
        shown = b"".join(bytes(entry.bytes) for entry in entries)
        assert shown.decode().startswith(choice.message.content)
        streamed = []
        for chunk in api.chat.completions.create(**ask, stream=True):
            if chunk.choices and chunk.choices[0].logprobs is not None:
                streamed += chunk.choices[0].logprobs.content
        assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def logprobs_of_completions(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 5}
        choice = api.completions.create(**ask, logprobs=2, echo=True).choices[0]
        told = choice.logprobs
        assert choice.text.startswith(PROMPT)
        assert told.token_logprobs[0] is None
        for token, offset in zip(told.tokens, told.text_offset, strict=True):
            assert choice.text[offset:].startswith(token), (token, offset)
        scored = api.completions.create(
            model=servers.model, prompt=PROMPT, logprobs=1, echo=True, max_tokens=0
        ).choices[0]
        assert scored.text == PROMPT
        assert scored.logprobs.tokens == told.tokens[: len(scored.logprobs.tokens)]


def stop_strings(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "prompt": PROMPT, **GREEDY}
        text = api.completions.create(**ask).choices[0].text
        stop = text[len(text) // 3 : len(text) // 2]  # begins and ends within tokens
        choice = api.completions.create(**ask, stop=[stop, "never said"]).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"
        pieces = [
            chunk.choices[0].text for chunk in api.completions.create(**ask, stop=stop, stream=True)
        ]
        assert "".join(pieces) == choice.text


def usage_in_streams(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, **GREEDY, "stream": True}
        assert all(chunk.usage is None for chunk in api.chat.completions.create(**ask))
        *others, last = api.chat.completions.create(**ask, stream_options={"include_usage": True})
        assert last.choices == []
        assert all(chunk.usage is None and chunk.choices for chunk in others)
        whole = api.chat.completions.create(**{**ask, "stream": False}).usage
        assert last.usage.completion_tokens == whole.completion_tokens
        options = {"include_usage": True, "continuous_usage_stats": True}
        stream = api.chat.completions.create(**ask, stream_options=options)
        counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage is not None]
        assert counts == sorted(counts)
        assert counts[-1] == whole.completion_tokens


def the_same_seed_says_the_same(servers: Servers) -> None:
    with client(servers) as api:
        ask = {"model": servers.model, "prompt": PROMPT, "max_tokens": 16, "temperature": 1.5}
        texts = [api.completions.create(**ask, seed=seed).choices[0].text for seed in (1, 1, 2)]
        assert texts[0] == texts[1] != texts[2]


def a_named_tool_call(servers: Servers) -> None:
    """A grammar holds even the bundled model to the schema."""
    properties = {"city": {"enum": ["Oslo", "Rome"]}, "metric": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": "weather", "parameters": schema}}
    with client(servers) as api:
        ask = {"model": servers.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 200}
        named = {"type": "function", "function": {"name": "weather"}}
        ask |= {"tools": [tool], "tool_choice": named}
        (call,) = api.chat.completions.create(**ask).choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == set(properties)
        deltas = [
            delta
            for chunk in api.chat.completions.create(**ask, stream=True)
            for delta in chunk.choices[0].delta.tool_calls or []
        ]
        streamed = "".join(delta.function.arguments or "" for delta in deltas)
        assert streamed == call.function.arguments


# ---------------------------------------------------------------- errors


def error_of(kind: type[openai.APIStatusError], call: Any, **ask: Any) -> Any:
    """What a call must raise."""
    caught = None
    try:
        call(**ask)
    except kind as error:
        caught = error
    assert caught is not None, f"no {kind.__name__}"
    assert caught.message
    assert caught.request_id
    return caught


def errors_in_requests(servers: Servers) -> None:
    with client(servers) as api:
        create = api.chat.completions.create
        for stream in (False, True):
            ask = {"model": servers.model, "messages": MESSAGES, "stream": stream}
            error = error_of(openai.NotFoundError, create, **{**ask, "model": "other"})
            assert (error.code, error.status_code) == ("model_not_found", 404)
            error = error_of(openai.BadRequestError, create, **ask, temperature=3)
            assert (error.param, error.type) == ("temperature", "invalid_request_error")
            error = error_of(openai.BadRequestError, create, **ask, extra_body={"typo": 1})
            assert error.param == "typo"
            error = error_of(openai.BadRequestError, create, **ask, max_tokens=10**6)
            assert error.code == "context_length_exceeded"
            assert f"maximum context length is {servers.max_model_len} tokens" in error.message
            error = error_of(openai.BadRequestError, create, **ask, modalities=["audio"])
            assert error.param == "modalities"


def keys_and_limits(servers: Servers) -> None:
    with openai.OpenAI(base_url=servers.guarded_base, api_key="wrong", max_retries=0) as api:
        error = error_of(openai.AuthenticationError, api.models.list)
        assert (error.code, error.status_code) == ("invalid_api_key", 401)
    ask: dict[str, Any] = {"model": servers.model, "prompt": PROMPT, "max_tokens": 2}
    with openai.OpenAI(base_url=servers.guarded_base, api_key=servers.key, max_retries=0) as api:
        answer = api.completions.with_raw_response.create(**ask)
        assert answer.headers["x-ratelimit-limit-requests"] == "1"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert answer.parse().choices[0].text
        error = error_of(openai.RateLimitError, api.completions.create, **ask)
        assert error.code == "rate_limit_exceeded"
        assert int(error.response.headers["retry-after"]) > 0


# ---------------------------------------------------------------- leaving, many at once


def a_stream_that_is_closed(servers: Servers) -> None:
    before = num_aborted(servers)
    with client(servers) as api:
        stream = api.chat.completions.create(
            model=servers.model, messages=MESSAGES, stream=True, **LONG
        )
        for _, _chunk in zip(range(3), stream, strict=False):
            pass
        stream.close()
    wait_until(lambda: num_aborted(servers) == before + 1, "the request has ended")
    assert num_running(servers) == 0


def a_call_that_is_cancelled(servers: Servers) -> None:
    before = num_aborted(servers)

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=servers.base, api_key="none", max_retries=0) as api:
            call: Any = api.completions.create
            task = asyncio.create_task(call(model=servers.model, prompt=PROMPT, **LONG))
            await asyncio.to_thread(wait_until, lambda: num_running(servers) == 1, "it runs")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    wait_until(lambda: num_aborted(servers) == before + 1, "the request has ended")
    assert num_running(servers) == 0


def many_at_once(servers: Servers) -> None:
    """Each answer is the one that the request gets alone."""

    async def ask(api: Any, number: int) -> str:
        stream = await api.chat.completions.create(
            model=servers.model,
            messages=[{"role": "user", "content": f"Write function number {number}."}],
            stream=True,
            **GREEDY,
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return "".join(pieces)

    async def scenario() -> None:
        async with openai.AsyncOpenAI(base_url=servers.base, api_key="none", max_retries=0) as api:
            alone = [await ask(api, number) for number in range(6)]
            together = await asyncio.gather(*(ask(api, number % 6) for number in range(24)))
            assert together == alone * 4

    asyncio.run(scenario())


CASES = [
    models,
    completions_streamed_or_not,
    several_prompts_and_token_ids,
    chat_streamed_or_not,
    the_stream_helper,
    several_choices,
    developer_and_parts,
    logprobs_of_chat,
    logprobs_of_completions,
    stop_strings,
    usage_in_streams,
    the_same_seed_says_the_same,
    a_named_tool_call,
    errors_in_requests,
    keys_and_limits,
    a_stream_that_is_closed,
    a_call_that_is_cancelled,
    many_at_once,
]

if __name__ == "__main__":
    main(CASES)
