"""Sends requests under one of two disciplines and hands each record on as it completes.

Closed loop: N clients, each sends its next request when its last one has ended. Open loop: requests
are sent when they are due, whatever has become of the earlier ones, up to a limit in flight; a wait
at that limit shows as lateness in the record instead of silently lowering the rate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from tuner.client import Clock
from tuner.record import RequestRecord
from tuner.workload import RequestSpec

Send = Callable[[RequestSpec, float], Awaitable[RequestRecord]]
Done = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop sending; what is in flight then is waited for."""

    num_requests: int | None
    duration_s: float | None

    def take(self, specs: Iterable[RequestSpec], clock: Clock) -> Iterator[RequestSpec]:
        """The specs that may still be sent, looked at when each is asked for."""
        start = clock()
        for number, spec in enumerate(specs):
            if self.num_requests is not None and number >= self.num_requests:
                return
            if self.duration_s is not None and clock() - start >= self.duration_s:
                return
            yield spec

    def within(self, offsets: Iterable[float]) -> Iterator[float]:
        """The offsets before the end of the duration."""
        end = float("inf") if self.duration_s is None else self.duration_s
        return takewhile(lambda offset: offset < end, offsets)


async def closed_loop(
    specs: Iterator[RequestSpec], concurrency: int, send: Send, done: Done, clock: Clock
) -> None:
    """Keep `concurrency` requests in flight until `specs` ends."""

    async def client() -> None:
        for spec in specs:  # the clients share one iterator
            done(await send(spec, clock()))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(client())


async def open_loop(
    specs: Iterator[RequestSpec],
    offsets: Iterable[float],
    max_in_flight: int,
    send: Send,
    done: Done,
    clock: Clock,
) -> None:
    """Send each request at its offset until `specs` ends."""
    start = clock()
    places = asyncio.Semaphore(max_in_flight)

    async def one(spec: RequestSpec, due: float) -> None:
        try:
            done(await send(spec, due))
        finally:
            places.release()

    async with asyncio.TaskGroup() as in_flight:
        for spec, offset in zip(specs, offsets, strict=False):  # the first to end ends the load
            await asyncio.sleep(max(0.0, start + offset - clock()))
            await places.acquire()
            in_flight.create_task(one(spec, start + offset))
