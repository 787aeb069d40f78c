"""A trace asked of a running fleet, every request of it."""

from __future__ import annotations

import asyncio

from tuner.arrivals import Arrival
from tuner.bench import Run, measure
from tuner.client import Target, base_url
from tuner.drive import Limits
from tuner.record import RequestRecord
from tuner.settings import BenchSettings
from tuner.trace import Trace
from tuner.workload import Span, Workload
from wire.errors import ConfigError


def bench_run(url: str, trace: Trace, seed: int) -> Run:
    """A run of the load generator. A seed's prompts are like no other's: no cache knows them."""
    settings = BenchSettings(
        target=Target(base_url(url), None, ignore_eos=True),
        workload=Workload(Span(1, 1), Span(1, 1), seed=seed),
        limits=Limits(None, None),
        concurrency=4096,
        rate=None,
        arrival=Arrival.POISSON,
        warmup=0,
        trace=trace,
    )
    return Run(settings)


def replay(url: str, trace: Trace, seed: int) -> list[RequestRecord]:
    """What its client saw, in the order of the trace; ConfigError where a request fails."""
    run = bench_run(url, trace, seed)
    asyncio.run(measure(run))
    failed = next((record for record in run.records if record.error is not None), None)
    if failed is not None:
        raise ConfigError(f"a request of {trace.name} failed: {failed.error}: {failed.message}")
    return sorted(run.records, key=lambda record: record.index)
