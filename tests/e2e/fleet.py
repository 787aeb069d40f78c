"""A router and nodes as real processes on loopback, owned by a test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e import inside
from tests.e2e.client import Answer

ROOT = Path(__file__).parents[2]
_START_TIMEOUT_S = 60.0

_SERVING = [
    f'baton_router_nodes{{role="{role}",state="serving"}}'
    for role in ("prefill", "decode", "mixed")
]

Orders = Sequence[tuple[str, dict[str, Any]]]
"""Mischief from the start on; see mischief.py."""


class Zygote:
    """Starts processes by fork; see zygote.py."""

    def __init__(self) -> None:
        env = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", PYTHONPATH=str(ROOT))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        assert self._read() == {"ready": True}

    def start(self, module: str, argv: list[str], log: Path, orders: Orders = ()) -> int:
        command = {"module": module, "argv": argv, "log": str(log), "orders": list(orders)}
        return int(self._ask(command)["pid"])

    def wait(self, pid: int, timeout_s: float) -> int | None:
        code: int | None = self._ask({"wait": pid, "timeout_s": timeout_s})["code"]
        return code

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote has died"
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass
class Process:
    """One process of the fleet."""

    name: str
    pid: int
    log: Path
    zygote: Zygote
    fields: dict[str, str] = field(default_factory=dict)
    code: int | None = None
    recipe: tuple[str, tuple[str, ...]] = ("", ())  # role and flags, of a node

    @property
    def url(self) -> str:
        return self.fields["http"]

    def wait_ready(self) -> None:
        """Return when it has printed its ready line; fail with its log if it ends or hangs."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            text = self.log.read_text() if self.log.exists() else ""
            for line in text.splitlines():
                if line.startswith("baton ") and " ready " in line:
                    self.fields = dict(w.split("=", 1) for w in line.split() if "=" in w)
                    return
            if self.wait(0) is not None:
                raise AssertionError(f"{self.name} ended with {self.code}:\n{text}")
            time.sleep(0.02)
        raise AssertionError(f"{self.name} is not ready:\n{self.log.read_text()}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, or None while it runs."""
        if self.code is None:
            self.code = self.zygote.wait(self.pid, timeout_s)
        return self.code

    def order(self, mischief: str, **arguments: Any) -> None:
        """Make mischief in it; see mischief.py."""
        inside.ask(self.pid, "order", mischief, arguments)

    def behave(self) -> None:
        """End all mischief."""
        inside.ask(self.pid, "behave")

    def look(self) -> inside.Books:
        """What it believes to hold."""
        books: inside.Books = inside.ask(self.pid, "look")
        return books

    @property
    def stopped(self) -> bool:
        """Whether it stands still."""
        status = Path(f"/proc/{self.pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] in "tT"

    def metrics(self) -> dict[str, float]:
        """Its /metrics, by name with labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


class Fleet:
    """Processes that end with the test."""

    def __init__(self, zygote: Zygote, folder: Path, model: Path) -> None:
        self._zygote = zygote
        self._folder = folder
        self.model = model
        self.router: Process | None = None
        self.nodes: dict[str, Process] = {}
        self.known: dict[object, Answer] = {}  # right ones, by question
        self._all: list[Process] = []

    @property
    def url(self) -> str:
        assert self.router is not None
        return self.router.url

    def start_router(self, *flags: str, orders: Orders = ()) -> Process:
        """Its prompts are too short to be worth a handoff, which most tests are about."""
        argv = ["--port", "0", "--control-port", "0", "--tokenizer", str(self.model)]
        argv += ["--handoff", "always"]
        self.router = self._start("router", "router.__main__", [*argv, *flags], orders)
        self.router.wait_ready()
        return self.router

    def start_node(self, role: str, name: str, *flags: str, orders: Orders = ()) -> Process:
        """Start a node without waiting for it."""
        node = self.nodes[name] = self.start_stranger(role, name, *flags, orders=orders)
        node.recipe = (role, flags)
        return node

    def start_stranger(
        self, role: str, name: str, *flags: str, model: Path | None = None, orders: Orders = ()
    ) -> Process:
        """Start a node that the fleet may refuse; nobody waits for it or counts it."""
        assert self.router is not None, "start the router first"
        argv = [str(model or self.model), "--router", self.router.fields["control"]]
        argv += ["--name", name, "--kv-memory", "64M", "--drain-timeout-s", "10", "--threads", "1"]
        return self._start(name, "baton.node", [role, *argv, *flags], orders)

    def restart_node(self, name: str) -> Process:
        """Start a node that has ended once more, as it was, without waiting for it."""
        role, flags = self.nodes[name].recipe
        return self.start_node(role, name, *flags)

    def start(self, prefill: int = 1, decode: int = 1, flags: tuple[str, ...] = ()) -> Fleet:
        """A whole fleet, ready."""
        self.start_router()
        for role, count in (("prefill", prefill), ("decode", decode)):
            for index in range(count):
                self.start_node(role, f"{role}-{index}", *flags)
        for node in self.nodes.values():
            node.wait_ready()
        self.wait_serving()
        return self

    def _start(self, name: str, module: str, argv: list[str], orders: Orders = ()) -> Process:
        log = self._folder / f"{name}-{len(self._all)}.log"
        process = Process(name, self._zygote.start(module, argv, log, orders), log, self._zygote)
        self._all.append(process)
        return process

    def wait_serving(self, status: int = 200) -> None:
        """Return when the router's /ready answers with `status`."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._ready_status() == status:
                return
            time.sleep(0.05)
        raise AssertionError(f"/ready is not {status}")

    def _ready_status(self) -> int:
        try:
            with urllib.request.urlopen(f"{self.url}/ready", timeout=5) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def role(self, role: str) -> list[Process]:
        """Its nodes of one role."""
        return [node for node in self.nodes.values() if node.recipe[0] == role]

    def heal(self) -> None:
        """After a test: everything runs, behaves, serves and holds nothing."""
        for name, node in list(self.nodes.items()):
            if node.wait(0) is not None:
                self.restart_node(name)
            elif node.stopped:
                node.send(signal.SIGCONT)
        for node in self.nodes.values():
            node.wait_ready()
            node.behave()
        self.wait_for_nodes()
        self.assert_balanced()

    def wait_for_nodes(self) -> None:
        """Return when the router gives work to every node."""
        assert self.router is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (serving := self.num_serving) != len(self.nodes):
            assert time.monotonic() < deadline, f"{serving} nodes serve"
            time.sleep(0.02)

    @property
    def num_serving(self) -> float:
        """Nodes that the router would give work to."""
        assert self.router is not None
        metrics = self.router.metrics().items()
        return sum(n for name, n in metrics if name in _SERVING)

    def kill(self, name: str) -> None:
        """kill -9, and wait for the end."""
        process = self.nodes.pop(name)
        process.send(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL

    def assert_balanced(self, timeout_s: float = 20.0) -> None:
        """Every block of every living node becomes free or cached within a lease's life."""
        deadline = time.monotonic() + timeout_s
        while True:
            counts = {name: _block_counts(node) for name, node in self.nodes.items()}
            if all(free + cached == capacity for free, cached, capacity in counts.values()):
                break
            assert time.monotonic() < deadline, f"blocks (free, cached, capacity): {counts}"
            time.sleep(0.1)
        for name, node in self.nodes.items():
            books = node.look()
            assert not books["contradiction"], f"{name}: {books}"

    def close(self) -> None:
        """End everything; what does not end by itself is killed."""
        for process in reversed(self._all):
            if process.wait(0) is None:
                process.send(signal.SIGTERM)
        for process in reversed(self._all):
            if process.wait(15) is None:
                process.send(signal.SIGKILL)
                process.wait(10)

    def logs(self) -> str:
        """Everything that every process said."""
        return "\n".join(f"--- {p.name}\n{p.log.read_text()}" for p in self._all if p.log.exists())


class Count:
    """How much a node has counted since this was made."""

    def __init__(self, node: Process, name: str) -> None:
        self._node, self._name = node, name
        self._before = self._read()

    def _read(self) -> float:
        return self._node.metrics().get(self._name, 0.0)

    def since(self) -> float:
        return self._read() - self._before


def handoffs(node: Process, outcome: str) -> Count:
    """Handoffs of a node that ended so."""
    return Count(node, f'baton_handoffs_total{{outcome="{outcome}"}}')


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.005)


def _block_counts(node: Process) -> tuple[float, float, float]:
    values = node.metrics()
    return (
        values['baton_blocks{state="free"}'],
        values['baton_blocks{state="cached"}'],
        values["baton_blocks_capacity"],
    )
