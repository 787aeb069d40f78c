"""Real nodes that change roles under load: how long they are away, and who notices."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from tuner.bench import Run, measure
from tuner.record import RequestRecord
from wire.errors import ConfigError

NODE = "decode-0"
DRAIN_S = 0.0  # its requests move at once, by the handoff
SWITCH_TIMEOUT_S = 120.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Switched:
    """What came of a load with switches."""

    return_s: Sequence[float]  # from the last moved request to the next registration
    num_failed: int
    num_requests: int


async def switch_under_load(url: str, run: Run, num_switches: int, pause_s: float) -> Switched:
    """Put the load on, and switch one node there and back meanwhile; raises ConfigError."""
    load = asyncio.create_task(measure(run))
    seconds = []
    async with aiohttp.ClientSession(url) as session:
        for number in range(num_switches):
            await asyncio.sleep(pause_s)
            seconds.append(await _switch(session, ("prefill", "decode")[number % 2]))
    await load
    return Switched(seconds, sum(map(_failed, run.records)), len(run.records))


def _failed(record: RequestRecord) -> bool:
    return record.error is not None


async def _switch(session: aiohttp.ClientSession, role: str) -> float:
    body = {"node": NODE, "role": role, "drain_s": DRAIN_S}
    async with session.post("/admin/role", json=body) as response:
        if response.status != 202:
            raise ConfigError(f"{NODE} cannot become {role}: {await response.text()}")
    async with asyncio.timeout(SWITCH_TIMEOUT_S):
        while True:
            async with session.get("/debug/fleet") as response:
                told = (await response.json())["role_switches"][-1]
            if told["outcome"]:
                break
            await asyncio.sleep(POLL_S)
    if told["outcome"] != "done":
        raise ConfigError(f"{NODE} did not become {role}: {told['outcome']}, {told['reason']}")
    return float(told["return_s"])
