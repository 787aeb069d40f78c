"""A network between nodes that a test can hold up, damage and let go on.

A node that advertises another loopback address (`--advertise-host`) is reached there by nobody, so
a relay can stand in its way: it listens on the same port of that address and passes everything on.
What is held is taken off the wire, so it outlives its sender, as packets do in a real network.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

REACHED_AT = "127.0.0.2"
"""For `--advertise-host`."""

_CHUNK_BYTES = 1 << 16

Result = TypeVar("Result")


class Network:
    """Relays on a thread of their own. Use as a context manager."""

    def __enter__(self) -> Network:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")
        self._thread.start()
        self._relays: list[Relay] = []
        return self

    def relay(self, port: int) -> Relay:
        """A new one in front of a node's port."""
        relay = self._do(_started(Relay(self._loop, port)))
        self._relays.append(relay)
        return relay

    def __exit__(self, *exc: object) -> None:
        for relay in self._relays:
            self._do(relay.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _do(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)


class Relay:
    """Passes connections on to one port, both ways.

    `num_bytes` counts what came for the node, passed on or not.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, port: int) -> None:
        self.port = port
        self.num_bytes = 0
        self._loop = loop
        self._open = asyncio.Event()
        self._open.set()
        self._garbled: tuple[int, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # ------------------------------------------------------------ for the test, from any thread

    def hold(self) -> None:
        """From now on nothing arrives, in neither direction."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def release(self) -> None:
        """Everything that was held arrives now."""
        self._loop.call_soon_threadsafe(self._open.set)

    def garble(self, start: int, end: int) -> None:
        """The lowest bit of each of these bytes on the way to the node will arrive inverted.

        They are counted over the relay's life, like `num_bytes`.
        """
        self._garbled = (start, end)

    # ------------------------------------------------------------ inside

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._connected, REACHED_AT, self.port)

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        try:
            far, forth = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:  # the node is gone
            back.close()
            return
        for source, sink, change in ((near, forth, self._toward_node), (far, back, bytes)):
            task = asyncio.ensure_future(self._pass_on(source, sink, change))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        change: Callable[[bytes], bytes],
    ) -> None:
        """Take what comes at once; write it when the relay is open, and only then its end."""
        waiting: asyncio.Queue[bytes] = asyncio.Queue()
        reading = asyncio.ensure_future(_read_into(waiting, source, change))
        try:
            while data := await waiting.get():
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        except OSError:  # whom it was for is gone
            reading.cancel()
        finally:
            sink.close()
            with suppress(OSError):
                await sink.wait_closed()

    def _toward_node(self, data: bytes) -> bytes:
        before, self.num_bytes = self.num_bytes, self.num_bytes + len(data)
        if self._garbled is None:
            return data
        start, end = (min(max(place - before, 0), len(data)) for place in self._garbled)
        garbled = bytes(byte ^ 1 for byte in data[start:end])
        return data[:start] + garbled + data[end:]


async def _started(relay: Relay) -> Relay:
    await relay.start()
    return relay


async def _read_into(
    queue: asyncio.Queue[bytes], source: asyncio.StreamReader, change: Callable[[bytes], bytes]
) -> None:
    data = b"?"
    while data:
        try:
            data = await source.read(_CHUNK_BYTES)
        except OSError:
            data = b""
        queue.put_nowait(change(data) if data else data)
