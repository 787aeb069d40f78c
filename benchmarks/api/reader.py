"""Reads many event streams with as little work as possible, and notes when their frames came."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

_FRAME = b"data: "
_END = b"0\r\n\r\n"  # of a chunked body


class StreamBroken(Exception):
    """A stream ended before its end or was refused."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Of all streams together, from the moment when each had its first frame until the last end."""

    num_frames: int
    seconds: float
    num_reads: int  # pieces that the frames came in

    @property
    def per_second(self) -> float:
        return self.num_frames / self.seconds


class _Stream(asyncio.Protocol):
    """One connection with one request."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._pieces: list[bytes] = []
        self.arrivals: list[tuple[float, int]] = []  # (when, frames)
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.arrivals.append((time.perf_counter(), data.count(_FRAME)))
        self._pieces.append(data)
        if data.endswith(_END):
            self._transport.close()
            if not self.ended.done():
                self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(StreamBroken(self.body()[:300].decode(errors="replace")))

    def body(self) -> bytes:
        return b"".join(self._pieces)


async def read_streams(url: str, request: bytes, num_streams: int, num_frames: int) -> Arrivals:
    """Send `request` on so many connections; each must bring `num_frames`, `[DONE]` included.

    One less is right too: the decode node's first words may overtake the prefill node's token, and
    then both are one event.
    """
    loop = asyncio.get_running_loop()
    server = urlsplit(url)
    opened = [
        loop.create_connection(lambda: _Stream(request), server.hostname or "", server.port or 80)
        for _ in range(num_streams)
    ]
    streams = [protocol for _, protocol in await asyncio.gather(*opened)]
    async with asyncio.timeout(120):
        await asyncio.gather(*(stream.ended for stream in streams))
    for stream in streams:
        count = stream.body().count(_FRAME)
        if count not in (num_frames - 1, num_frames):
            raise StreamBroken(f"{count} frames instead of {num_frames}: {stream.body()[:300]!r}")
    return _summary(streams)


def _summary(streams: list[_Stream]) -> Arrivals:
    first = max(next(when for when, count in s.arrivals if count) for s in streams)
    later = [item for s in streams for item in s.arrivals if item[0] > first]
    if not later:
        raise StreamBroken("the streams were too short to run together")
    last = max(when for when, _ in later)
    return Arrivals(sum(count for _, count in later), last - first, len(later))
