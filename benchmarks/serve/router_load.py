"""One router process under streams that a stub fleet feeds, and the floor under the same load.

    stub: stamps a token, sends it ─▶ router ─▶ client          floor: stamps an event ─▶ client

Stamp and arrival are read from the same clock (CLOCK_MONOTONIC, one per machine). Only what is sent
while all streams are open counts. Floor and router take turns, so that a change of the machine's
mood hits both.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serve.memory import MB, resident_bytes
from benchmarks.serve.processes import Running, free_port, running
from benchmarks.serve.streams import Call, Stream, open_together, read_streams
from benchmarks.stamps import stamp_age

READY_S = 60.0
LATENCY_STREAMS = 100
LATENCY_STEP_S = 0.05
LOAD_STREAMS = 500
LOAD_STEP_S = 0.2
GROUP_SIZE = 32  # streams whose tokens share one message


class LoadFailed(Exception):
    """A stream of a latency measurement failed."""


@dataclass(frozen=True, slots=True)
class Load:
    """How many streams, of how many events each, one event per period."""

    num_streams: int
    num_events: int
    period_s: float


def measure_router(folder: Path, quick: bool) -> dict[str, float]:
    """Added latency at 100 streams, then many streams, then the router's memory."""
    latency = Load(LATENCY_STREAMS, 40 if quick else 120, LATENCY_STEP_S)
    many = Load(LOAD_STREAMS, 15 if quick else 50, LOAD_STEP_S)
    with router(folder) as (process, http, control):
        floors, routed = [], []
        for _ in range(1 if quick else 3):
            floors.append(floor_ms(folder, latency))
            routed.append(routed_ms(folder, http, control, latency))
        num_streams = num_clean_streams(folder, http, control, many)
        rss = resident_bytes(process.pid) / MB
    floor, through = statistics.median(floors), statistics.median(routed)
    print(
        f"router    at {latency.num_streams} streams: {through:.2f} ms from send to receive, "
        f"bare aiohttp {floor:.2f} ms"
    )
    print(f"router    {num_streams} streams at once without an error, then {rss:.0f} MB resident")
    return {
        "router_streams": num_streams,
        "router_added_ms_p50": round(through - floor, 2),
        "router_rss_mb": round(rss, 1),
    }


@contextmanager
def router(folder: Path) -> Iterator[tuple[Running, str, str]]:
    """A router process, its HTTP address and the address for nodes."""
    command = [sys.executable, "-m", "router", "--port", str(free_port()), "--control-port", "0"]
    with running(command, folder / "router.log") as process:
        ready = process.wait_for(r"^baton router ready http=(\S+) control=(\S+)", READY_S)
        yield process, ready[1], ready[2]


def floor_ms(folder: Path, load: Load) -> float:
    """Median latency of the bare server."""
    command = [sys.executable, "-m", "benchmarks.serve.floor", "--port", str(free_port())]
    command += ["--period", str(load.period_s), "--group-size", str(GROUP_SIZE)]
    with running(command, folder / "floor.log") as process:
        url = process.wait_for(r"^floor ready (\S+)", READY_S)[1]
        call = Call("GET", f"{url}/stream?events={load.num_events}")
        streams = asyncio.run(read_streams([call] * load.num_streams))
    return _median_ms(streams, lambda at_ns, event: float(at_ns - event["sent_ns"]) / 1e6)


def routed_ms(folder: Path, http: str, control: str, load: Load) -> float:
    """Median latency from the stub through the router."""
    streams = _through_router(folder, http, control, load)
    return _median_ms(streams, lambda at_ns, event: _stamp_ms(at_ns, event))


def num_clean_streams(folder: Path, http: str, control: str, load: Load) -> int:
    """How many streams were open at one moment and came to their end; errors are printed."""
    streams = _through_router(folder, http, control, load)
    for error in sorted({stream.error for stream in streams if stream.error}):
        print(f"router    error: {error}", file=sys.stderr)
    whole = [s for s in streams if s.error is None and _num_tokens(s) == load.num_events]
    if len(whole) < len(streams):
        print(f"router    {len(streams) - len(whole)} streams failed or were cut", file=sys.stderr)
    return open_together(whole)


def _through_router(folder: Path, http: str, control: str, load: Load) -> list[Stream]:
    command = [sys.executable, "-m", "benchmarks.stub_pair", "--router", control]
    command += ["--step-ms", str(load.period_s * 1e3)]
    body = {
        "model": "stub",
        "prompt": [1, 2, 3],
        "max_tokens": load.num_events,
        "temperature": 0,
        "stream": True,
    }
    with running(command, folder / "stub.log") as stub:
        stub.wait_for(r"^stub ready", READY_S)
        _wait_until_served(http)
        call = Call("POST", f"{http}/v1/completions", body)
        return asyncio.run(read_streams([call] * load.num_streams))


def _wait_until_served(http: str) -> None:
    """The router has the stub's tokenizer."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{http}/ready", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            time.sleep(0.05)
    raise LoadFailed(f"{http}/ready does not say that the stub is served")


def _median_ms(streams: Sequence[Stream], latency: Callable[[int, dict[str, Any]], float]) -> float:
    """Over the events that arrived while all streams were open."""
    for stream in streams:
        if stream.error:
            raise LoadFailed(stream.error)
    opened = max(stream.arrivals[0][0] for stream in streams)
    closed = min(stream.arrivals[-1][0] for stream in streams)
    return statistics.median(
        latency(at_ns, event)
        for stream in streams
        for at_ns, event in stream.arrivals
        if opened < at_ns < closed and _carries_token(event)
    )


def _stamp_ms(at_ns: int, event: dict[str, Any]) -> float:
    """Age of the newest token of an event (several may have been joined)."""
    newest = event["choices"][0]["text"].rstrip(";").rpartition(";")[2]
    return stamp_age(newest, at_ns / 1e9) * 1e3


def _carries_token(event: dict[str, Any]) -> bool:
    return "sent_ns" in event or any(choice["text"] for choice in event["choices"])


def _num_tokens(stream: Stream) -> int:
    texts = (choice["text"] for _, event in stream.arrivals for choice in event["choices"])
    return sum(text.count(";") for text in texts)
