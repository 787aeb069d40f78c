"""Many SSE streams at once, read by one process that notes when each event arrived."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import aiohttp

from tuner.sse import SseParser

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Call:
    """One request whose answer is a stream."""

    method: str
    url: str
    body: dict[str, Any] | None = None


@dataclass(slots=True)
class Stream:
    """What came back on one call, in order."""

    arrivals: list[tuple[int, dict[str, Any]]]  # (time.monotonic_ns(), event)
    error: str | None = None


async def read_streams(calls: Sequence[Call]) -> list[Stream]:
    """Make all calls at once and read all streams to their end."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        return await asyncio.gather(*(_read(session, call) for call in calls))


async def _read(session: aiohttp.ClientSession, call: Call) -> Stream:
    stream = Stream([])
    parser = SseParser()
    try:
        async with session.request(call.method, call.url, json=call.body) as response:
            if response.status != 200:
                stream.error = f"http {response.status}: {(await response.text())[:200]}"
                return stream
            async for data in response.content.iter_any():
                now = time.monotonic_ns()
                events = (event for event in parser.feed(data) if event != "[DONE]")
                stream.arrivals += [(now, json.loads(event)) for event in events]
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream


def open_together(streams: Iterable[Stream]) -> int:
    """The largest number of streams that were open at one moment, from first to last event."""
    spans = [(s.arrivals[0][0], s.arrivals[-1][0]) for s in streams if s.arrivals]
    changes = sorted([(start, 1) for start, _ in spans] + [(end, -1) for _, end in spans])
    return max(accumulate(change for _, change in changes), default=0)
