"""What the client programs share: where the servers are, and how their cases run and report.

A program runs in the environment of its client, gets the addresses as its argument, and prints one
line per case: `{"case": name, "error": null or text}`. `tests/e2e/test_clients.py` runs them all.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Servers:
    """Two routers in front of the same nodes."""

    open: str  # serves everybody
    guarded: str  # wants a key, and allows it one request per minute
    key: str
    model: str
    max_model_len: int

    @property
    def base(self) -> str:
        return f"{self.open}/v1"

    @property
    def guarded_base(self) -> str:
        return f"{self.guarded}/v1"


Case = Callable[[Servers], None]

MESSAGES = [{"role": "user", "content": "Write a function that counts the words in a text."}]
PROMPT = "def read_lines(path):\n"


def main(cases: Sequence[Case]) -> None:
    """Run all; a failure does not keep the others from running."""
    servers = Servers(**json.loads(sys.argv[1]))
    report, sys.stdout = sys.stdout, sys.stderr  # clients print too
    for case in cases:
        error = None
        try:
            case(servers)
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"case": case.__name__, "error": error}), file=report, flush=True)


def metric(servers: Servers, name: str, label: str = "") -> float:
    """The sum of a metric of the open router over all series that have `label`."""
    with urllib.request.urlopen(f"{servers.open}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    mine = [line for line in lines if line.startswith(f"{name}{{") and label in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in mine)


def num_aborted(servers: Servers) -> float:
    """Choices whose clients have left."""
    return metric(servers, "vllm:request_success_total", 'finished_reason="abort"')


def num_running(servers: Servers) -> float:
    """Choices on nodes."""
    return metric(servers, "vllm:num_requests_running")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.02)
