"""The floor: a bare aiohttp server that streams events with their send time, and does nothing else.

    tick: the send time is taken, a group of streams is woken ─▶ each writes one event

A group is as large as one message of a node to the router, so that both answer the same bursts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field

from aiohttp import web


@dataclass(slots=True)
class Ticker:
    """Gives the time of a tick to one group after the other, all within a period."""

    period_s: float  # between two events of one stream
    group_size: int
    queues: list[asyncio.Queue[int]] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            started = time.monotonic()
            groups = range(0, len(self.queues), self.group_size)
            for number, first in enumerate(groups):
                await _sleep_until(started + self.period_s * number / len(groups))
                now = time.monotonic_ns()
                for queue in self.queues[first : first + self.group_size]:
                    queue.put_nowait(now)
            await _sleep_until(started + self.period_s)


async def _sleep_until(when: float) -> None:
    await asyncio.sleep(max(0.0, when - time.monotonic()))


def event(sent_ns: int) -> bytes:
    """About as long as a chunk of the router."""
    body = {
        "id": "cmpl-0123456789abcdef01234567",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "stub",
        "choices": [{"index": 0, "text": "token", "logprobs": None, "finish_reason": None}],
        "sent_ns": sent_ns,
    }
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def stream(request: web.Request, ticker: Ticker) -> web.StreamResponse:
    """As many events as the request asks for."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    queue: asyncio.Queue[int] = asyncio.Queue()
    ticker.queues.append(queue)
    try:
        for _ in range(int(request.query["events"])):
            await response.write(event(await queue.get()))
    finally:
        ticker.queues.remove(queue)
    return response


async def serve(port: int, ticker: Ticker) -> None:
    """Serve until cancelled."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, ticker)

    app = web.Application()
    app.router.add_get("/stream", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    print(f"floor ready http://127.0.0.1:{port}", flush=True)
    try:
        await ticker.run()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--period", type=float, default=0.05, help="seconds between events")
    parser.add_argument("--group-size", type=int, default=32)
    args = parser.parse_args()
    asyncio.run(serve(args.port, Ticker(args.period, args.group_size)))


if __name__ == "__main__":
    main()
