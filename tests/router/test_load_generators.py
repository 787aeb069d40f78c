"""What load generators that others wrote send, as their sources and logs show it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.router.harness import endless, router
from wire.request_messages import Prefill

USAGE = {"include_usage": True}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vllm bench serve": (
        "/v1/completions",
        {
            "model": "stub",
            "prompt": "hi",
            "repetition_penalty": 1.0,
            "max_tokens": 5,
            "logprobs": None,
            "stream": True,
            "stream_options": USAGE,
            "ignore_eos": True,
            "temperature": 0.0,
        },
    ),
    "guidellm, chat": (
        "/v1/chat/completions",
        {
            "model": "stub",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "stream": True,
            "stream_options": {**USAGE, "continuous_usage_stats": True},
            "max_completion_tokens": 5,
            "stop": None,
            "ignore_eos": True,
        },
    ),
    "guidellm, text": (
        "/v1/completions",
        {
            "model": "stub",
            "prompt": "hi",
            "stream": True,
            "stream_options": {**USAGE, "continuous_usage_stats": True},
            "max_tokens": 5,
            "stop": None,
            "ignore_eos": True,
        },
    ),
    "aiperf": (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "name": "", "content": "hi"}],
            "model": "stub",
            "stream": True,
            "stream_options": USAGE,
            "max_completion_tokens": 5,
            "min_tokens": 5,
            "ignore_eos": True,
        },
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_of(name: str) -> None:
    path, body = REQUESTS[name]

    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await harness.post(path, body)
            assert answer.status == 200, answer.body
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            *texts, last = answer.events
            assert last["usage"]["completion_tokens"] == 5
            assert "cached_tokens" in last["usage"]["prompt_tokens_details"]
            assert all(event["choices"] for event in texts)
            (sent,) = harness.sent(Prefill)
            assert sent.sampling.ignore_eos
            assert sent.sampling.max_tokens == 5

    asyncio.run(scenario())


def test_what_they_ask_before_and_meanwhile() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            assert (await harness.get("/health")).status == 200
            assert (await harness.get("/v1/models")).json["data"][0]["id"] == "stub"
            tokens = await harness.post("/tokenize", {"model": "stub", "prompt": "hi"})
            assert tokens.json["count"] == 2
            async with harness.session.head(harness.url + "/metrics") as response:
                assert response.status == 200
            assert b"vllm:num_requests_running" in (await harness.get("/metrics")).body

    asyncio.run(scenario())
