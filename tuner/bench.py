"""`baton bench`: load on any OpenAI-compatible endpoint, and a report of what its clients saw.

settings → workload or trace (what, when) → drive (closed or open loop) → client (one request)
         → report → results (JSON) → html_report
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

from tuner.client import make_session, resolve_model, send
from tuner.drive import Done, closed_loop, open_loop
from tuner.files import check_places, write_text
from tuner.flags import add_arguments
from tuner.goodput import Slo, attainment
from tuner.html_report import html_report
from tuner.plots import require_matplotlib
from tuner.record import RequestRecord
from tuner.report import (
    Report,
    build_report,
    is_late,
    late_line,
    latency_table,
    overview_lines,
)
from tuner.results import Json, named_results, result_json, sweep_json
from tuner.settings import BenchSettings, settings_from
from tuner.watch import watching
from tuner.workload import RequestSpec, Workload, requests
from wire.errors import ConfigError

__all__ = ["add_arguments", "measure", "run", "run_report"]


@dataclass(slots=True)
class Run:
    """One load as far as it has come, so that Ctrl-C loses nothing."""

    settings: BenchSettings
    records: list[RequestRecord] = field(default_factory=list)
    fleet: list[Json] = field(default_factory=list)

    def as_json(self) -> Json:
        settings = self.settings
        return result_json(self.records, settings.as_json(), settings.slo, self.fleet)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 0 if any request completed, 1 if none did, 130 after Ctrl-C."""
    try:
        settings = settings_from(args)
        check_places(settings.json_path, settings.html_path)
        if settings.html_path is not None:
            require_matplotlib()
        for note in settings.notes:
            print(note, file=sys.stderr)
        return _run(settings)
    except ConfigError as error:
        print(f"baton bench: {error}", file=sys.stderr)
        return 1


def run_report(paths: Sequence[Path], output: Path) -> int:
    """`baton bench report`: the plots of several result files in one HTML file."""
    try:
        check_places(output)
        require_matplotlib()
        write_text(output, html_report(named_results(paths)))
    except ConfigError as error:
        print(f"baton bench report: {error}", file=sys.stderr)
        return 1
    return 0


def _run(settings: BenchSettings) -> int:
    runs: list[Run] = []
    try:
        for planned in _planned(settings):
            runs.append(Run(planned))
            asyncio.run(measure(runs[-1]))
            if settings.sweep:
                _console(settings).print(f"{planned.rate:g} requests per second", style="bold")
            _print(runs[-1])
    except KeyboardInterrupt:
        print("interrupted; what was measured until then:", file=sys.stderr)
        _print(runs[-1])
        _publish(runs)
        return 130
    except ConfigError:  # the server has gone between two rates
        if runs[:-1]:
            _publish(runs[:-1])
        raise
    _publish(runs)
    return 0 if any(record.error is None for run in runs for record in run.records) else 1


def _planned(settings: BenchSettings) -> Sequence[BenchSettings]:
    """The runs, one for each rate of a sweep."""
    if not settings.sweep:
        return [settings]
    return [settings.at_rate(rate, edition) for edition, rate in enumerate(settings.sweep)]


async def measure(run: Run) -> None:
    """Put the load on; `run` grows as requests end, and gets the model that was asked in the end.

    Raises:
        ConfigError: nothing answers there, or it does not serve the model.
    """
    async with make_session(run.settings.target) as session:
        target = await resolve_model(session, run.settings.target)
        run.settings = settings = replace(run.settings, target=target)
        await _warm_up(session, settings)
        async with watching(session, target.url, time.perf_counter) as fleet:
            run.fleet = fleet
            with _progress(_num_expected(settings)) as advance:

                def done(record: RequestRecord) -> None:
                    run.records.append(record)
                    advance(record)

                await _drive(session, settings, done)


def _num_expected(settings: BenchSettings) -> int | None:
    """Requests that will be sent, as far as that is known before."""
    limit, trace = settings.limits.num_requests, settings.trace
    if trace is None:
        return limit
    return len(trace.requests) if limit is None else min(limit, len(trace.requests))


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

    specs = settings.limits.take(settings.specs(), clock)
    if settings.is_open_loop:
        offsets = settings.limits.within(settings.offsets())
        await open_loop(specs, offsets, settings.concurrency, send_one, done, clock)
    else:
        await closed_loop(specs, settings.concurrency, send_one, done, clock)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[RequestRecord], None]]:
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
        task = progress.add_task("", total=total, failed=0)

        def advance(record: RequestRecord) -> None:
            nonlocal num_failed
            num_failed += record.error is not None
            progress.update(task, advance=1, failed=num_failed)

        yield advance


def _console(settings: BenchSettings) -> Console:
    """Stdout, or stderr where stdout takes the JSON."""
    return Console(stderr=settings.json_path == Path("-"), highlight=False)


def _print(run: Run) -> None:
    """Counts and table."""
    console, report = _console(run.settings), build_report(run.records)
    console.print("\n".join(overview_lines(report)), soft_wrap=True, markup=False)
    console.print(latency_table(report))
    if run.settings.is_open_loop and is_late(report):
        console.print(late_line(report, run.settings.concurrency), soft_wrap=True)
    if run.settings.slo is not None:
        console.print(_goodput_line(run.records, report, run.settings.slo), soft_wrap=True)


def _goodput_line(records: list[RequestRecord], report: Report, slo: Slo) -> str:
    good = attainment(records, slo)
    rate = good.good * len(records) / report.duration_s if report.duration_s else 0.0
    return (
        f"goodput    {rate:.2f} per second: {good.good:.1%} of all requests within "
        f"{1e3 * slo.ttft_s:g} ms TTFT ({good.ttft:.1%}) and {1e3 * slo.tpot_s:g} ms TPOT "
        f"({good.tpot:.1%})"
    )


def _publish(runs: list[Run]) -> None:
    """The files that were asked for."""
    settings = runs[0].settings
    results = [run.as_json() for run in runs]
    if settings.json_path is not None:
        whole = sweep_json(results) if settings.sweep else results[0]
        text = json.dumps(whole, indent=2) + "\n"
        if settings.json_path == Path("-"):
            sys.stdout.write(text)
        else:
            write_text(settings.json_path, text)
    if settings.html_path is not None:
        rates = [f"{run.settings.rate:g}/s" if settings.sweep else "run" for run in runs]
        named = list(zip(rates, results, strict=True))
        write_text(settings.html_path, html_report({"sweep" if settings.sweep else "run": named}))
