"""How much of a prompt's KV has left before the prompt is computed, on real processes.

    prefill node   | chunk 1 | chunk 2 | chunk 3 | chunk 4 |first token
    the wire         ........ ▒▒▒▒▒▒▒▒▒ ▒▒▒▒▒▒▒▒▒ ▒▒▒▒▒▒▒▒▒▒ tail
    decode node                                                | second token

The prefill node itself says what had left when its last forward pass ended (its metric of the
tail).
"""

from __future__ import annotations

import re
import statistics
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serve.client import ask
from benchmarks.serve.fleet import START_TIMEOUT_S, FirstToSecond, median_first_to_second
from benchmarks.serve.processes import BATON, Running, running
from telemetry import metrics
from tuner.workload import Span, Workload, requests

PROMPT_TOKENS = 1024
CHUNK_TOKENS = 256
OUTPUT_TOKENS = 24
KV_POOL_BYTES = 256 << 20
READY = r"^baton \w+ ready name=\S+ http=(\S+)"


@dataclass(frozen=True, slots=True)
class Overlap:
    """Medians over unloaded requests, one at a time."""

    early: float  # share of the bytes that had left when the last chunk's forward pass ended
    tail_ms: float  # from there to the commit
    second: FirstToSecond


@dataclass(frozen=True, slots=True)
class Sums:
    """What a prefill node's metrics have added up over all its handoffs."""

    num_bytes: float
    tail_bytes: float
    tail_s: float

    def since(self, earlier: Sums) -> Sums:
        return Sums(
            self.num_bytes - earlier.num_bytes,
            self.tail_bytes - earlier.tail_bytes,
            self.tail_s - earlier.tail_s,
        )


def measure_overlap(folder: Path, model: Path, transport: str, num_requests: int) -> Overlap:
    """Prompts of 1,024 tokens in chunks of 256, between two nodes on one thread each."""
    workload = Workload(
        input_len=Span(PROMPT_TOKENS, PROMPT_TOKENS),
        output_len=Span(OUTPUT_TOKENS, OUTPUT_TOKENS),
    )
    warm_up, *specs = islice(requests(workload), num_requests + 1)
    records, handoffs = [], []
    with _pair(folder, model, transport) as (router_url, prefill_url):
        ask(router_url, [warm_up])
        for spec in specs:
            before = read_sums(scrape(prefill_url), transport)
            records += ask(router_url, [spec])
            handoffs.append(read_sums(scrape(prefill_url), transport).since(before))
    return Overlap(
        early=statistics.median(1 - each.tail_bytes / each.num_bytes for each in handoffs),
        tail_ms=1e3 * statistics.median(each.tail_s for each in handoffs),
        second=median_first_to_second(records),
    )


def scrape(url: str) -> str:
    """A node's metrics page."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        text: str = page.read().decode()
    return text


def read_sums(page: str, transport: str) -> Sums:
    """The sums of the histograms in a metrics page; zeros where there was no handoff yet."""
    found = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("transport") == transport
    }
    names = (metrics.TRANSFER_BYTES, metrics.TRANSFER_TAIL_BYTES, metrics.TRANSFER_TAIL_SECONDS)
    return Sums(*(found.get(f"{metric.name}_sum", 0.0) for metric in names))


@contextmanager
def _pair(folder: Path, model: Path, transport: str) -> Iterator[tuple[str, str]]:
    """A router, a decode node and a prefill node; the URLs of the first and the last."""
    with ExitStack() as fleet:

        def start(command: Sequence[str | Path], ready: str) -> re.Match[str]:
            log = folder / f"{transport}-{len(started)}.log"
            started.append(fleet.enter_context(running([BATON, *command], log)))
            return started[-1].wait_for(ready, START_TIMEOUT_S)

        started: list[Running] = []
        router = start(["router", "--port", "0"], r"^baton router ready http=(\S+) control=(\S+)")
        flags = ["--router", router[2], "--transport", transport, "--threads", "1"]
        flags += ["--kv-memory", str(KV_POOL_BYTES), "--max-num-batched-tokens", str(CHUNK_TOKENS)]
        start(["decode", model, *flags], READY)
        prefill = start(["prefill", model, *flags], READY)
        yield router[1], prefill[1]
