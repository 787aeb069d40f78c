"""The benchmark's requests, sent and timed by the load generator's own client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tuner.client import Target, make_session, resolve_model, send
from tuner.record import RequestRecord
from tuner.workload import RequestSpec


class RequestFailed(Exception):
    """A request of the benchmark failed, so there is nothing to measure."""


def ask(url: str, specs: Sequence[RequestSpec]) -> list[RequestRecord]:
    """Send `specs` one after the other; times are `time.perf_counter()`.

    Raises:
        RequestFailed: one of them did not complete.
    """
    return asyncio.run(_ask(Target(url=url, model=None, ignore_eos=True), specs))


async def _ask(target: Target, specs: Sequence[RequestSpec]) -> list[RequestRecord]:
    async with make_session(target) as session:
        target = await resolve_model(session, target)
        now = time.perf_counter
        records = [await send(session, target, spec, now(), now) for spec in specs]
    for record in records:
        if record.error:
            raise RequestFailed(f"{record.error}: {record.message}")
    return records
