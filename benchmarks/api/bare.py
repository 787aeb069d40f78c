"""What the router's streams are measured against: aiohttp, and one prebuilt frame per write.

    python -m benchmarks.api.bare --port 8000        GET /stream?frames=300&together=200

All streams that should run together wait for the last one, as the stub's do.
"""

from __future__ import annotations

import argparse
import asyncio

from aiohttp import web

from benchmarks.stamps import stamp, stamp_tokenizer
from router.chunks import DONE, CompletionFormat, TokenDetails
from router.event_stream import HEADERS
from router.logprobs import TokenNames
from router.tokenizer import tokenizer_from_files


def frame() -> bytes:
    """One token's event, as long as the router's."""
    names = TokenNames(tokenizer_from_files(stamp_tokenizer(), "stub"), False, "")
    format = CompletionFormat("0" * 32, "stub", 1_700_000_000, TokenDetails(names))
    return format.text(0, f"{stamp(0.0):05d};", None, [], 0).encode()


class Bare:
    """The handler."""

    def __init__(self) -> None:
        self._frame = frame()
        self._num_waiting = 0
        self._all_there = asyncio.Event()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=HEADERS)
        await response.prepare(request)
        await response.write(self._frame)
        self._num_waiting += 1
        if self._num_waiting == int(request.query["together"]):
            self._all_there.set()
        await self._all_there.wait()
        for _ in range(int(request.query["frames"]) - 1):
            await response.write(self._frame)
            await asyncio.sleep(0)  # one token of each stream after the other, as they are sampled
        await response.write(DONE)
        return response


async def start(port: int) -> web.AppRunner:
    """Serve in the running loop until the result is cleaned up."""
    app = web.Application()
    app.router.add_get("/stream", Bare().stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    return runner


async def serve(port: int) -> None:
    runner = await start(port)
    print(f"bare ready http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    asyncio.run(serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
