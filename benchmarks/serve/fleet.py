"""Measurements on real processes: `baton serve` as a user starts it.

typed ──── start_s ────▶ first token        t1 ── t2 ── t3 ── t4 …     the request's tokens
                                            |prefill|-- decode node --|
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from benchmarks.serve.client import ask
from benchmarks.serve.memory import MB, children, memory_of
from benchmarks.serve.processes import BATON, Running, free_port, running
from tuner.record import RequestRecord
from tuner.workload import RequestSpec, Span, Workload, requests

READY = r"^baton ready (http://\S+)"
START_TIMEOUT_S = 180.0
KV_POOL_BYTES = 16 << 20  # whether its pages were touched yet must not matter for the node's memory


@contextmanager
def serving(folder: Path, flags: Sequence[str | Path]) -> Iterator[tuple[Running, str]]:
    """A running `baton serve` and its URL."""
    port = free_port()
    command = [BATON, "serve", *flags, "--port", str(port)]
    with running(command, folder / f"serve-{port}.log") as process:
        url = process.wait_for(READY, START_TIMEOUT_S)[1]
        yield process, url


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from typing `baton serve`."""

    ready_s: float  # to the ready line
    token_s: float  # to the first streamed token


def measure_one_start(folder: Path) -> Start:
    """Start `baton serve` on the bundled model and ask for one answer."""
    typed = time.perf_counter()
    with serving(folder, []) as (_, url):
        ready = time.perf_counter()
        (record,) = ask(url, [RequestSpec(0, "def main():\n", 8)])
    return Start(ready - typed, record.chunk_times[0] - typed)


@dataclass(frozen=True, slots=True)
class FirstToSecond:
    """How long the handoff keeps the second token back."""

    steps: float  # (t2 - t1) in decode steps
    second_ms: float  # t2 - t1
    step_ms: float  # median decode step


def first_to_second(url: str, num_requests: int) -> FirstToSecond:
    """Medians over unloaded requests, one at a time, after one that warms up."""
    workload = Workload(input_len=Span(64, 64), output_len=Span(32, 32))
    records = ask(url, list(islice(requests(workload), num_requests + 1)))[1:]
    return median_first_to_second(records)


def median_first_to_second(records: Sequence[RequestRecord]) -> FirstToSecond:
    """The median request's figures; a step is the median gap after the second token."""
    seconds = [record.itls[0] for record in records]
    steps = [statistics.median(record.itls[1:]) for record in records]
    ratios = [second / step for second, step in zip(seconds, steps, strict=True)]
    median = statistics.median
    return FirstToSecond(median(ratios), median(seconds) * 1e3, median(steps) * 1e3)


def node_overheads_mb(launcher: int, weight_bytes: int) -> dict[str, float]:
    """Private memory of each node beyond the weights, by role and process id.

    Mapped weights are not private memory. Where a node has read them into its own memory instead,
    they are subtracted. The KV pool is so small here that it is left in.
    """
    overheads = {}
    for pid, command in children(launcher).items():
        if role := re.search(r"-m (prefill|decode)_node", command):
            memory = memory_of(pid)
            copied = memory.weight_files < weight_bytes // 2
            overheads[f"{role[1]} {pid}"] = (memory.private - weight_bytes * copied) / MB
    return overheads
