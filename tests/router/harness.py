"""A router with stub nodes in one event loop, on real sockets, for tests of the whole path."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.stub_node import model_info
from benchmarks.stub_pair import Script, StubPair
from router.config import RouterConfig
from router.server import RouterServer
from router.way import Mode
from tests.router import tiny_tokenizer
from wire.messages import Message
from wire.request_messages import Prefill
from wire.types import FinishReason

CONFIG = RouterConfig(
    port=0,
    control_port=0,
    heartbeat_s=0.05,
    node_timeout_s=0.5,
    queue_timeout_s=2.0,
    shutdown_timeout_s=0.2,
    handoff=Mode.ALWAYS,
)
MODEL = model_info(tiny_tokenizer.VOCAB_SIZE, max_model_len=512)


def saying(text: str, *, end: int = tiny_tokenizer.EOS) -> Script:
    """A script: the bytes of `text`, then the end token; `max_tokens` may cut it."""
    tokens = [*text.encode(), end]

    def script(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
        token = tokens[index]
        if token == end and index == len(tokens) - 1:
            return token, FinishReason.STOP
        limit = index + 1 >= request.sampling.max_tokens
        return token, FinishReason.LENGTH if limit else None

    return script


def endless(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
    """A script: letters, until `max_tokens`."""
    limit = index + 1 >= request.sampling.max_tokens
    return ord("a") + index % 26, FinishReason.LENGTH if limit else None


def alphabet(count: int) -> str:
    """What `endless` says."""
    return "".join(chr(ord("a") + index % 26) for index in range(count))


@dataclass(slots=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]

    @property
    def events(self) -> list[Any]:
        """The stream's events; the last one must be `[DONE]`, once."""
        lines = self.body.decode().split("\n\n")
        assert lines.pop() == ""
        assert all(line.startswith("data: ") for line in lines)
        payloads = [line.removeprefix("data: ") for line in lines]
        assert payloads.pop() == "[DONE]"
        assert "[DONE]" not in payloads
        return [json.loads(payload) for payload in payloads]


@dataclass(slots=True)
class Harness:
    """What a test holds."""

    server: RouterServer
    session: aiohttp.ClientSession
    pairs: list[StubPair]

    @property
    def pair(self) -> StubPair:
        return self.pairs[0]

    @property
    def url(self) -> str:
        return self.server.http_url

    @property
    def routes(self) -> list[web.AbstractResource]:
        runner = self.server._runner
        assert runner is not None
        return list(runner.app.router.resources())

    async def post(self, path: str, body: Any) -> Answer:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(self.url + path, data=data) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def get(self, path: str) -> Answer:
        async with self.session.get(self.url + path) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def complete(self, **fields: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": "hi", **fields})

    async def chat(self, text: str = "hi", **fields: Any) -> Answer:
        messages = [{"role": "user", "content": text}]
        return await self.post("/v1/chat/completions", {"messages": messages, **fields})

    async def add_pair(self, script: Script, **options: Any) -> StubPair:
        name = str(len(self.pairs)) if self.pairs else ""
        pair = StubPair(
            self.server.control.url, script, MODEL, tiny_tokenizer.files(), name=name, **options
        )
        self.pairs.append(pair)
        pair.peers = self.pairs
        await pair.ready()
        await eventually(lambda: self.server.control.ready)
        return pair

    def sent(self, kind: type[Message]) -> list[Any]:
        """Messages of this kind that the router sent to any stub."""
        nodes = [node for pair in self.pairs for node in (pair.prefill, pair.decode)]
        return [message for node in nodes for message in node.received if type(message) is kind]


@asynccontextmanager
async def router(script: Script | None = None, **options: Any) -> AsyncIterator[Harness]:
    """A router, and a pair of stub nodes that follows `script`; `options` change the config."""
    pair_options = {key: options.pop(key) for key in ("step_s",) if key in options}
    server = RouterServer(replace(CONFIG, **options))
    pairs: list[StubPair] = []
    try:
        await server.start()
        async with aiohttp.ClientSession() as session:
            harness = Harness(server, session, pairs)
            if script is not None:
                await harness.add_pair(script, **pair_options)
            yield harness
    finally:
        async with asyncio.timeout(10):
            for pair in pairs:
                await pair.close()
            await server.close()


async def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
