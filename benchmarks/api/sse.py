"""One router process, 200 streams, one frame per token, against a bare aiohttp server.

The stub holds its tokens back until all streams run, then sends as fast as it can, so that the
router is the only one that is always busy. The reader counts frames and does not parse them. Both
servers are measured in turns; processor time is that of the server's process alone, which a busy
machine changes less than the time on the clock.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.api.reader import Arrivals, read_streams
from benchmarks.serve.processes import free_port, running

NUM_STREAMS = 200
READY_S = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens of one round."""

    per_second: float
    per_cpu_second: float


def measure_sse(folder: Path, quick: bool) -> dict[str, float]:
    rounds, num_tokens = (2, 100) if quick else (7, 300)
    routed: list[Rate] = []
    bare: list[Rate] = []
    with router(folder, num_tokens) as through_router, bare_server(folder, num_tokens) as direct:
        for _ in range(rounds):
            routed.append(through_router())
            bare.append(direct())
    for name, rates in (("router", routed), ("bare aiohttp", bare)):
        seconds, cpu = [rate.per_second for rate in rates], [rate.per_cpu_second for rate in rates]
        print(
            f"sse       {name}: {statistics.median(seconds):,.0f} tokens/s (best "
            f"{max(seconds):,.0f}), {statistics.median(cpu):,.0f} per second of processor time"
        )
    pairs = list(zip(routed, bare, strict=True))  # of neighbouring rounds
    return {
        "sse_tokens_per_s": round(statistics.median(a.per_second for a in routed)),
        "sse_vs_bare_aiohttp": _median([a.per_second / b.per_second for a, b in pairs]),
        "sse_tokens_per_cpu_s": round(statistics.median(a.per_cpu_second for a in routed)),
        "sse_vs_bare_aiohttp_cpu": _median([a.per_cpu_second / b.per_cpu_second for a, b in pairs]),
    }


def _median(ratios: list[float]) -> float:
    return round(statistics.median(ratios), 2)


def _round(pid: int, url: str, request: bytes, num_frames: int) -> Rate:
    """CPU time counts from before the requests on, so it has their beginnings too."""
    process = psutil.Process(pid)
    before = sum(process.cpu_times()[:2])
    arrivals: Arrivals = asyncio.run(read_streams(url, request, NUM_STREAMS, num_frames))
    used = sum(process.cpu_times()[:2]) - before
    return Rate(arrivals.per_second, NUM_STREAMS * num_frames / used)


@contextmanager
def router(folder: Path, num_tokens: int) -> Iterator[Callable[[], Rate]]:
    """A router process and a stub; each call of the result is a round."""
    port = free_port()
    command = [sys.executable, "-m", "router", "--port", str(port), "--control-port", "0"]
    body = {"model": "stub", "prompt": [1, 2, 3], "max_tokens": num_tokens, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with running(command, folder / "router.log") as process:
        ready = process.wait_for(r"^baton router ready http=(\S+) control=(\S+)", READY_S)
        stub = [sys.executable, "-m", "benchmarks.stub_pair", "--router", ready[2]]
        stub += ["--step-ms", "0", "--together", str(NUM_STREAMS)]
        with running(stub, folder / "stub.log") as feed:
            feed.wait_for(r"^stub ready", READY_S)
            _wait_until_served(ready[1])
            # The last event has the finish reason, and [DONE] follows.
            yield lambda: _round(process.pid, ready[1], head.encode() + data, num_tokens + 2)


@contextmanager
def bare_server(folder: Path, num_tokens: int) -> Iterator[Callable[[], Rate]]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.api.bare", "--port", str(port)]
    path = f"/stream?frames={num_tokens + 1}&together={NUM_STREAMS}"
    with running(command, folder / "bare.log") as process:
        url = process.wait_for(r"^bare ready (\S+)", READY_S)[1]
        request = f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
        yield lambda: _round(process.pid, url, request, num_tokens + 2)


def _wait_until_served(http: str) -> None:
    """The router has the stub's tokenizer."""
    deadline = time.monotonic() + READY_S
    while True:
        try:
            urllib.request.urlopen(f"{http}/ready", timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
