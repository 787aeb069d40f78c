"""Looks at the fleet while the load is on, where the endpoint tells of it (`/debug/fleet`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp

from tuner.client import Clock

INTERVAL_S = 0.5
MAX_SAMPLES = 7200  # an hour; a longer run is seen up to there
Json = dict[str, Any]


@asynccontextmanager
async def watching(
    session: aiohttp.ClientSession, url: str, clock: Clock
) -> AsyncIterator[list[Json]]:
    """Samples of the fleet, growing while the block runs; stays empty at other servers."""
    seen: list[Json] = []
    task = asyncio.create_task(_watch(session, url, clock, seen))
    try:
        yield seen
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(session: aiohttp.ClientSession, url: str, clock: Clock, seen: list[Json]) -> None:
    begin = clock()
    while len(seen) < MAX_SAMPLES:
        told = await _ask(session, url)
        if told is None:
            return
        seen.append({"at_s": round(clock() - begin, 3), **told})
        await asyncio.sleep(INTERVAL_S)


async def _ask(session: aiohttp.ClientSession, url: str) -> Json | None:
    """What the router says of its nodes; None if this is no server that does."""
    try:
        async with session.get(f"{url}/debug/fleet") as answer:
            if answer.status != 200:
                return None
            told = await answer.json()
        return {"waiting": told["waiting"], "nodes": [_node(node) for node in told["nodes"]]}
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError):
        return None


def _node(node: Json) -> Json:
    load = node["load"]
    total = load["blocks_total"]
    return {
        "name": node["name"],
        "role": node["role"],
        "kv_used": round(1 - load["blocks_free"] / total, 4) if total else 0.0,
        "running": load["num_running"],
        "waiting": load["num_waiting"],
        "queued_tokens": load["queued_tokens"],
    }
