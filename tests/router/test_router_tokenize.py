"""/tokenize and /detokenize: what vLLM's clients send, and what they get."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.router.harness import endless, router
from wire.request_messages import Prefill

USER = [{"role": "user", "content": "hé"}]


def test_text_there_and_back() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await harness.post("/tokenize", {"model": "stub", "prompt": "hé</s>"})
            tokens = [*"hé".encode(), 256]
            assert answer.json == {
                "count": 4,
                "max_model_len": 512,
                "tokens": tokens,
                "token_strs": None,
            }
            back = await harness.post("/detokenize", {"tokens": tokens})
            assert back.json == {"prompt": "hé</s>"}
            assert (await harness.post("/detokenize", {"tokens": []})).json == {"prompt": ""}
            assert (await harness.post("/tokenize", {"prompt": ""})).json["count"] == 0
            named = await harness.post("/tokenize", {"prompt": "h ", "return_token_strs": True})
            assert named.json["token_strs"] == ["h", "Ġ"]

    asyncio.run(scenario())


def test_messages_are_the_tokens_that_chat_would_send() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields in ({}, {"add_generation_prompt": False}):
                body: dict[str, Any] = {"messages": USER, **fields}
                tokens = (await harness.post("/tokenize", body)).json["tokens"]
                await harness.post("/v1/chat/completions", {**body, "max_tokens": 1})
                assert tokens == list(harness.sent(Prefill)[-1].tokens)

    asyncio.run(scenario())


def test_what_is_refused() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            cases: list[tuple[str, dict[str, Any], int, str]] = [
                ("/tokenize", {}, 400, "prompt"),
                ("/tokenize", {"prompt": "x", "messages": USER}, 400, "prompt"),
                ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, 400, _CHAT),
                ("/tokenize", {"prompt": "x", "other": 1}, 400, "other"),
                ("/tokenize", {"messages": USER, "chat_template": "x"}, 400, "chat_template"),
                ("/tokenize", {"messages": USER, "tools": [{}]}, 400, "tools"),
                ("/tokenize", {"prompt": "x", "model": "none"}, 404, "model"),
                ("/detokenize", {}, 400, "tokens"),
                ("/detokenize", {"tokens": "x"}, 400, "tokens"),
                ("/detokenize", {"tokens": [1 << 20]}, 400, "tokens"),
                ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
            ]
            for path, body, status, param in cases:
                answer = await harness.post(path, body)
                assert (answer.status, answer.error["param"]) == (status, param), body

    asyncio.run(scenario())


_CHAT = "add_generation_prompt"
