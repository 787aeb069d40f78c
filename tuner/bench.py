"""`baton bench`: load on any OpenAI-compatible endpoint, and a report of what its clients saw.

settings → workload (what, when) → drive (closed or open loop) → client (one request) → report
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from tuner.arrivals import arrival_offsets
from tuner.client import make_session, resolve_model, send
from tuner.drive import Done, Limits, closed_loop, open_loop
from tuner.record import RequestRecord
from tuner.report import Report, build_report, latency_table, overview_lines, to_json
from tuner.settings import BenchSettings, add_arguments, settings_from
from tuner.workload import RequestSpec, Workload, requests
from wire.errors import ConfigError

__all__ = ["add_arguments", "measure", "run"]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if any request completed, 1 if none did, 130 after Ctrl-C."""
    try:
        settings = settings_from(args)
        return _run(settings)
    except ConfigError as error:
        print(f"baton bench: {error}", file=sys.stderr)
        return 1


def _run(settings: BenchSettings) -> int:
    records: list[RequestRecord] = []
    try:
        settings = asyncio.run(measure(settings, records))
    except KeyboardInterrupt:
        print("interrupted; what was measured until then:", file=sys.stderr)
        _publish(build_report(records), settings)
        return 130
    report = build_report(records)
    _publish(report, settings)
    return 0 if report.num_completed else 1


async def measure(settings: BenchSettings, records: list[RequestRecord]) -> BenchSettings:
    """Put the load on; `records` grows as requests end, so that it survives Ctrl-C.

    Returns the settings with the model that was asked in the end.

    Raises:
        ConfigError: nothing answers there, or it does not serve the model.
    """
    async with make_session(settings.target) as session:
        target = await resolve_model(session, settings.target)
        settings = replace(settings, target=target)
        await _warm_up(session, settings)
        with _progress(settings.limits) as advance:

            def done(record: RequestRecord) -> None:
                records.append(record)
                advance(record)

            await _drive(session, settings, done)
    return settings


async def _warm_up(session: aiohttp.ClientSession, settings: BenchSettings) -> None:
    """Requests of another seed, so that they leave no prefix of a measured one in a cache."""
    workload: Workload = replace(settings.workload, seed=~settings.workload.seed)
    specs = requests(workload)
    for _ in range(settings.warmup):
        now = time.perf_counter()
        await send(session, settings.target, next(specs), now, time.perf_counter)


async def _drive(session: aiohttp.ClientSession, settings: BenchSettings, done: Done) -> None:
    clock = time.perf_counter

    async def send_one(spec: RequestSpec, due: float) -> RequestRecord:
        return await send(session, settings.target, spec, due, clock)

    specs = settings.limits.take(requests(settings.workload), clock)
    if settings.rate is None:
        await closed_loop(specs, settings.concurrency, send_one, done, clock)
    else:
        offsets = arrival_offsets(settings.rate, settings.arrival, settings.workload.seed)
        offsets = settings.limits.within(offsets)
        await open_loop(specs, offsets, settings.concurrency, send_one, done, clock)


@contextmanager
def _progress(limits: Limits) -> Iterator[Callable[[RequestRecord], None]]:
    """A progress bar on stderr if that is a terminal; gives the function that advances it."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[failed]} failed"),
    )
    num_failed = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=limits.num_requests, failed=0)

        def advance(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += record.error is not None
            progress.update(task, advance=1, failed=num_failed)

        yield advance


def _publish(report: Report, settings: BenchSettings) -> None:
    """Counts and table on stdout, or on stderr where stdout takes the JSON."""
    to_stdout = settings.json_path == Path("-")
    console = Console(stderr=to_stdout, highlight=False)
    console.print("\n".join(overview_lines(report)), soft_wrap=True, markup=False)
    console.print(latency_table(report))
    if settings.json_path is None:
        return
    text = json.dumps(to_json(report, settings.as_json()), indent=2) + "\n"
    if to_stdout:
        sys.stdout.write(text)
    else:
        _write(settings.json_path, text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
