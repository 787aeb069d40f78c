"""A small server in this process for `baton bench`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web


class FakeServer:
    """An endpoint that streams `max_tokens` chunks of one token, and can be told to misbehave."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.fault: str | None = None
        self.pause_s = 0.0  # before each chunk
        self.interrupt_at: int | None = None  # Ctrl-C comes with this request, which gets no answer
        self.phases = ""  # the Server-Timing header of streams
        self.fleets: list[dict[str, Any]] = []  # what /debug/fleet says, one after the other
        self.url = ""

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/debug/fleet", self.fleet)
        app.router.add_post("/v1/completions", self.generate)
        app.router.add_post("/v1/chat/completions", self.generate)
        return app

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "first"}, {"id": "second"}]})

    async def fleet(self, request: web.Request) -> web.Response:
        if not self.fleets:
            return web.json_response({"error": {"message": "no"}}, status=404)
        told = self.fleets[0] if len(self.fleets) == 1 else self.fleets.pop(0)
        return web.json_response(told)

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if len(self.bodies) == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        if self.fault == "busy":
            return web.json_response({"error": {"message": "busy"}}, status=503)
        if self.fault == "whole":
            return web.json_response({"choices": [{"text": "x", "finish_reason": "stop"}]})
        headers = {"Content-Type": "text/event-stream", "Server-Timing": self.phases}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        await self.stream(response, body)
        return response

    async def stream(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        number = body.get("max_tokens") or body["max_completion_tokens"]
        for index in range(number):
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            finish = "length" if index == number - 1 else None
            choice = {"index": 0, "text": "x", "finish_reason": finish}
            data = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\r\n\r\n"
            await response.write(data[:9])  # a chunk border inside an event
            await response.write(data[9:] + b": ping\n\n")
            if self.fault == "cut" and index == 1:
                return
        usage = {"prompt_tokens": 11, "completion_tokens": number}
        event = json.dumps({"choices": [], "usage": usage}).encode()
        await response.write(b"data: " + event + b"\n\ndata: [DONE]\n\n")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Runs in its own thread, because `run` owns this thread's event loop."""
    fake = FakeServer()
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        runner = web.AppRunner(fake.application(), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()
