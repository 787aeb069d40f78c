"""`litellm`, with its providers for OpenAI's dialect and vLLM's."""

from __future__ import annotations

import asyncio
from typing import Any

import litellm

from tests.clients.cases import MESSAGES, PROMPT, Servers, main, num_aborted, wait_until

PROVIDERS = ("openai", "hosted_vllm")


def to(servers: Servers, provider: str = "openai", **more: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "model": f"{provider}/{servers.model}",
        "api_base": servers.base,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 24,
        "num_retries": 0,
        "max_retries": 0,
    }
    return settings | more


def chat_streamed_or_not(servers: Servers) -> None:
    for provider in PROVIDERS:
        whole = litellm.completion(messages=MESSAGES, **to(servers, provider))
        assert whole.choices[0].message.content
        assert whole.usage.completion_tokens > 0
        chunks = list(litellm.completion(messages=MESSAGES, stream=True, **to(servers, provider)))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def usage_in_streams(servers: Servers) -> None:
    for provider in PROVIDERS:
        stream = litellm.completion(
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **to(servers, provider),
        )
        counts = [chunk.usage.completion_tokens for chunk in stream if chunk.get("usage")]
        whole = litellm.completion(messages=MESSAGES, **to(servers, provider))
        assert counts[-1:] == [whole.usage.completion_tokens]


def completions(servers: Servers) -> None:
    ask = to(servers, "text-completion-openai")
    whole = litellm.text_completion(prompt=PROMPT, **ask)
    assert whole.choices[0].text
    chunks = litellm.text_completion(prompt=PROMPT, stream=True, **ask)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks) == whole.choices[0].text


def logprobs_stop_and_n(servers: Servers) -> None:
    whole = litellm.completion(messages=MESSAGES, logprobs=True, top_logprobs=2, **to(servers))
    text = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    middle = text[len(text) // 2 :][:4]
    cut = litellm.completion(messages=MESSAGES, stop=[middle], **to(servers)).choices[0]
    assert (cut.message.content, cut.finish_reason) == (text[: text.index(middle)], "stop")
    several = litellm.completion(messages=MESSAGES, n=2, **to(servers, temperature=1.0, seed=3))
    assert len({choice.message.content for choice in several.choices}) == 2


def concurrently(servers: Servers) -> None:
    async def ask(number: int) -> Any:
        messages = [{"role": "user", "content": f"Write function number {number}."}]
        answer = await litellm.acompletion(messages=messages, **to(servers))
        return answer.choices[0].message.content

    async def scenario() -> None:
        alone = [await ask(number) for number in range(4)]
        assert await asyncio.gather(*(ask(number % 4) for number in range(12))) == alone * 3

    asyncio.run(scenario())


def errors(servers: Servers) -> None:
    """It tells some of them by words in the message."""
    exceptions: Any = litellm.exceptions
    for kind, more in (
        (exceptions.NotFoundError, {"model": "openai/other"}),
        (exceptions.BadRequestError, {"top_p": 7.0}),
        (exceptions.ContextWindowExceededError, {"max_tokens": 10**6}),
        (exceptions.AuthenticationError, {"api_base": servers.guarded_base, "api_key": "wrong"}),
    ):
        for stream in (False, True):
            try:
                litellm.completion(messages=MESSAGES, stream=stream, **to(servers, **more))
            except kind:
                continue
            raise AssertionError(f"no {kind.__name__} for {more}")


def the_rate_limit(servers: Servers) -> None:
    ask = to(servers, api_base=servers.guarded_base, api_key=servers.key)
    litellm.completion(messages=MESSAGES, **ask)
    try:
        litellm.completion(messages=MESSAGES, **ask)
    except litellm.exceptions.RateLimitError:
        return
    raise AssertionError("no RateLimitError")


def a_stream_that_is_left(servers: Servers) -> None:
    before = num_aborted(servers)

    async def scenario() -> None:
        ask = to(servers, max_tokens=1500, extra_body={"ignore_eos": True})
        stream: Any = await litellm.acompletion(messages=MESSAGES, stream=True, **ask)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(scenario())
    wait_until(lambda: num_aborted(servers) == before + 1, "the request has ended")


CASES = [
    chat_streamed_or_not,
    usage_in_streams,
    completions,
    logprobs_stop_and_n,
    concurrently,
    errors,
    the_rate_limit,
    a_stream_that_is_left,
]

if __name__ == "__main__":
    litellm.telemetry = False
    main(CASES)
