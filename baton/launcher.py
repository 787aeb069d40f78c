"""The processes of a fleet on this machine, from their start to their end.

start      router first (the nodes register with it), then all nodes at once
supervise  a node that dies is reported and started again; the router's end is everybody's
stop       the router finishes its streams, then the nodes end
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from baton.children import Child
from baton.config import node_environment
from baton.fleet_flags import (
    NodeSpec,
    count_gpus,
    given_flags,
    node_counts,
    node_specs,
    on_its_device,
    tuner_notice,
)
from node import machine
from node.flags import add_decode_arguments, add_engine_arguments
from router.flags import add_arguments as add_router_arguments

_MAX_RESTARTS = 3  # of one node within the window; more is a fault that restarting does not cure
_RESTART_WINDOW_S = 60.0
_BACKOFF_S = 1.0  # longer before each further restart within the window
_STOP_TIMEOUT_S = 40.0


def say(text: str) -> None:
    """One line to the operator."""
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton serve: {text}", file=sys.stderr, flush=True)


def print_ready(url: str, what: str) -> None:
    """The ready line of `baton serve`."""
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton ready {url} {what}", flush=True)


class Launcher:
    """Owns the child processes.

    Args:
        on_ready: is told the router's URL and what it took, once all nodes serve.
    """

    def __init__(
        self, args: argparse.Namespace, on_ready: Callable[[str, str], None] = print_ready
    ) -> None:
        self._args = args
        self._on_ready = on_ready
        self._model_name = Path(args.model).resolve().name
        self._specs = node_specs(args)
        self._env = node_environment(
            args.threads or max(1, machine.usable_cores() // len(self._specs))
        )
        self._router: Child | None = None
        self._nodes: dict[str, Child] = {}
        self._deaths: dict[str, list[float]] = {}

    async def run(self) -> int:
        """Start, say when ready, supervise; returns when the fleet cannot go on."""
        started = time.monotonic()
        self._router = self._make_router()
        await self._router.start()
        router = await self._router.ready()
        if router is None:
            say(self._router.obituary())
            return 1
        control = router["control"]
        for spec in self._specs:
            await self._start_node(spec, control)
        say(f"{self._describe()}: loading {self._model_name}")
        if notice := tuner_notice(self._args):
            say(notice)
        if not await self._all_ready():
            return 1
        took = time.monotonic() - started
        self._on_ready(router["http"], f"{self._describe()} in {took:.1f} s")
        return await self._supervise(control)

    def _describe(self) -> str:
        counts = node_counts(self._args).items()
        return f"({', '.join(f'{count} {kind}' for kind, count in counts if count)})"

    async def _all_ready(self) -> bool:
        """Wait for all nodes; False as soon as any process has ended, which is then said."""
        assert self._router is not None
        loading = {asyncio.create_task(node.ready()): node for node in self._nodes.values()}
        router_end = asyncio.create_task(self._router.wait())
        try:
            while loading:
                waits = [*loading, router_end]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                done = [task for task in loading if task.done()]
                dead = [loading[task] for task in done if task.result() is None]
                if router_end.done():
                    dead = [self._router]
                if dead:
                    say(dead[0].obituary())
                    return False
                for task in done:
                    del loading[task]
            return True
        finally:
            for waiting in (*loading, router_end):
                waiting.cancel()

    async def _supervise(self, control: str) -> int:
        """Restart nodes that die; return when the router has died or a node keeps dying."""
        watches = [asyncio.create_task(self._keep(spec, control)) for spec in self._specs]
        watches.append(asyncio.create_task(self._watch_router()))
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
            for watch in done:
                watch.result()  # or the error that ended it
            return 1
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch_router(self) -> None:
        assert self._router is not None
        await self._router.wait()
        say(self._router.obituary())

    async def _keep(self, spec: NodeSpec, control: str) -> None:
        """Start the node again whenever it has died; return when that is of no use."""
        while True:
            node = self._nodes[spec.name]
            await node.wait()
            num_deaths = self._count_death(spec.name)
            if num_deaths > _MAX_RESTARTS:
                say(node.obituary())
                say(f"{spec.name} died {num_deaths} times in {_RESTART_WINDOW_S:.0f} s; giving up")
                return
            say(f"{node.obituary()}; starting it again")
            await asyncio.sleep((num_deaths - 1) * _BACKOFF_S)
            await self._start_node(spec, control)

    def _count_death(self, name: str) -> int:
        """The node's deaths within the window, this one included."""
        now = time.monotonic()
        recent = [t for t in self._deaths.get(name, []) if t > now - _RESTART_WINDOW_S]
        self._deaths[name] = [*recent, now]
        return len(self._deaths[name])

    async def _start_node(self, spec: NodeSpec, control: str) -> None:
        number = self._specs.index(spec)
        argv = [
            *(sys.executable, "-m", "baton.node", spec.role, self._args.model),
            *("--router", control, "--name", spec.name, "--log-level", "warning"),
            *given_flags(add_engine_arguments, on_its_device(self._args, number, count_gpus())),
        ]
        if self._args.key_file is not None:
            argv += ["--key-file", str(self._args.key_file)]
        argv += given_flags(add_decode_arguments, self._args)
        child = self._nodes[spec.name] = Child(spec.name, argv, self._env)
        await child.start()

    def _make_router(self) -> Child:
        program = ("router",) if self._args.workers == 1 else ("baton", "router")
        argv = [
            *(sys.executable, "-m", *program, "--tokenizer", self._args.model),
            *given_flags(add_router_arguments, self._args),
        ]
        return Child("router", argv, self._env)

    async def stop(self) -> None:
        """End all children: the router first, so that its streams can finish."""
        if self._router is not None:
            await self._router.stop(_STOP_TIMEOUT_S)
        await asyncio.gather(*(node.stop(_STOP_TIMEOUT_S) for node in self._nodes.values()))

    def kill(self) -> None:
        """End all children at once; `stop` still reaps them."""
        for child in (self._router, *self._nodes.values()):
            if child is not None:
                child.kill()
