"""A small OpenAI client for the tests: what was really sent, nothing smoothed over."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Answer:
    """One streamed or plain answer of /v1/completions or /v1/chat/completions."""

    status: int = 0
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    chunks: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    done: bool = False  # the stream ended with [DONE]


class Client:
    """Talks to one router. Use as an async context manager."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=110)
        self.session = aiohttp.ClientSession(self._url, connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.session.close()
        await asyncio.sleep(0)  # let the transports close before the loop does

    async def complete(self, **body: Any) -> Answer:
        """POST /v1/completions without streaming."""
        async with self.session.post("/v1/completions", json=body) as response:
            return _plain(response.status, await response.json())

    async def stream(
        self, *, path: str = "/v1/completions", stop_after: int | None = None, **body: Any
    ) -> Answer:
        """The same as a stream; hang up after `stop_after` chunks with text."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        answer = Answer()
        async with self.session.post(path, json=body) as response:
            answer.status = response.status
            if response.status != 200:
                return _plain(response.status, await response.json())
            num_texts = 0
            async for line in response.content:
                if _take(answer, line):
                    num_texts += 1
                if stop_after is not None and num_texts >= stop_after:
                    response.close()
                    break
        return answer


def _plain(status: int, body: dict[str, Any]) -> Answer:
    if status != 200:
        return Answer(status=status, error=body["error"])
    choice = body["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return Answer(
        status,
        text,
        choice["finish_reason"],
        body["usage"],
        token_ids=choice.get("token_ids", []),
        chunks=[body],
        done=True,
    )


def _take(answer: Answer, line: bytes) -> bool:
    """Add one line of the stream; True if it brought text."""
    if not line.startswith(b"data: "):
        return False
    data = line[6:].strip()
    if data == b"[DONE]":
        answer.done = True
        return False
    chunk = json.loads(data)
    answer.chunks.append(chunk)
    if "error" in chunk:
        answer.error = chunk["error"]
        return False
    if chunk.get("usage"):
        answer.usage = chunk["usage"]
    if not chunk["choices"]:
        return False
    choice = chunk["choices"][0]
    text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
    answer.text += text
    answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    return bool(text)
