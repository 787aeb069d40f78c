"""`baton router`: one router, or with `--workers N` several processes on one HTTP port.

The workers bind the port with SO_REUSEPORT: the kernel spreads connections over them. This parent
keeps the ports while workers come and go, starts again what dies, and sums up what they tell.

start      all workers at once; ready when all are
supervise  a worker that dies is started again, later each time; the others go on
stop       on SIGTERM or Ctrl-C all drain at the same time; a second one ends them at once
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import router.__main__ as single
from baton.children import Child
from baton.config import child_environment
from baton.ports import reserve_consecutive, reserve_shared
from baton.worker_pages import Life, WorkerPages
from router.config import RouterConfig
from router.flags import from_args
from router.place import Place

_BACKOFF_S = 0.5  # before the first restart; doubled for each death within the window
_MAX_BACKOFF_S = 30.0
_WINDOW_S = 120.0
_STOP_MARGIN_S = 10.0  # beyond --shutdown-timeout-s
_MAX_SOCKET_PATH = 100  # bytes; the kernel takes 107


def main(argv: Sequence[str]) -> int:
    """Route until stopped; returns the exit code."""
    args = single.make_parser().parse_args(argv)
    if args.workers == 1:
        return single.main(argv)
    return asyncio.run(_serve(args, argv))


async def _serve(args: argparse.Namespace, argv: Sequence[str]) -> int:
    config = from_args(args)
    async with AsyncExitStack() as closing:
        workers = Workers(config, argv, closing)
        stop = asyncio.Event()
        _on_signals(workers, stop)
        run = asyncio.create_task(workers.run())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((run, stopped), return_when=asyncio.FIRST_COMPLETED)
            return run.result() if run.done() else 0
        finally:
            for task in (run, stopped):
                task.cancel()
            await asyncio.gather(run, stopped, return_exceptions=True)
            await workers.stop()


def _on_signals(workers: Workers, stop: asyncio.Event) -> None:
    """SIGINT is left alone where the parent ignores it (a launcher owns Ctrl-C then)."""

    def stop_or_kill() -> None:
        if stop.is_set():
            workers.kill()
        stop.set()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop_or_kill)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGINT, stop_or_kill)


class Workers:
    """The router processes. Raises ConfigError where a port cannot be had.

    Args:
        argv: the operator's flags, which each worker gets.
        closing: ends what this has taken.
    """

    def __init__(self, config: RouterConfig, argv: Sequence[str], closing: AsyncExitStack) -> None:
        self._config = config
        self._argv = argv
        self._folder = Path(closing.enter_context(_socket_folder()))
        self._http_port = closing.enter_context(reserve_shared(config.host, config.port))
        self._control_ports = closing.enter_context(
            reserve_consecutive(config.control_host, config.control_port, config.workers)
        )
        self._children: dict[int, Child] = {}
        self._lives: dict[int, Life] = {}
        self._deaths: dict[int, list[float]] = {}
        self._pages = WorkerPages(self._place(0).launcher_socket, lambda: self._lives.values())

    async def run(self) -> int:
        """Start all, say when they are ready, supervise; returns if they cannot start."""
        await self._pages.start()
        for index in range(self._config.workers):
            await self._start(index)
        for index, child in self._children.items():
            fields = await child.ready()
            if fields is None:
                _say(child.obituary())
                return 1
            self._lives[index] = Life(self._place(index).own_socket)
            if index == 0:
                first = fields
        _tell_ready(f"http={first['http']} control={first['control']}")
        await asyncio.gather(*(self._keep(index) for index in self._children))
        return 1

    async def stop(self) -> None:
        timeout_s = self._config.shutdown_timeout_s + _STOP_MARGIN_S
        await asyncio.gather(*(child.stop(timeout_s) for child in self._children.values()))
        await self._pages.close()

    def kill(self) -> None:
        """End all at once; `stop` still reaps them."""
        for child in self._children.values():
            child.kill()

    async def _keep(self, index: int) -> None:
        """Start the worker again whenever it has died."""
        while True:
            child = self._children[index]
            await child.wait()
            life = self._lives.pop(index, None)
            if life is not None:
                self._pages.died(life)
            pause_s = self._pause_s(index)
            _say(f"{child.obituary()}; starting it again in {pause_s:g} s")
            await asyncio.sleep(pause_s)
            self._pages.metrics.restarts.inc()
            await self._start(index, returns=True)
            if await self._children[index].ready() is not None:
                self._lives[index] = Life(self._place(index).own_socket)

    def _pause_s(self, index: int) -> float:
        now = time.monotonic()
        recent = [t for t in self._deaths.get(index, []) if t > now - _WINDOW_S]
        self._deaths[index] = [*recent, now]
        return min(_MAX_BACKOFF_S, _BACKOFF_S * 2.0 ** len(recent))

    async def _start(self, index: int, *, returns: bool = False) -> None:
        argv = [
            *(sys.executable, "-m", "router", *self._argv),
            f"--port={self._http_port}",
            f"--control-port={self._control_ports[index]}",
            self._place(index, returns).flag(),
        ]
        child = self._children[index] = Child(f"router-{index}", argv, child_environment())
        await child.start()

    def _place(self, index: int, returns: bool = False) -> Place:
        return Place(index, self._folder, self._control_ports, returns)


def _socket_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that only this user can enter, whose path leaves room for a socket's name."""
    folder = tempfile.TemporaryDirectory(prefix="baton-", ignore_cleanup_errors=True)
    if len(folder.name.encode()) <= _MAX_SOCKET_PATH - len("/all.sock"):
        return folder
    folder.cleanup()
    return tempfile.TemporaryDirectory(prefix="baton-", dir="/tmp", ignore_cleanup_errors=True)


def _tell_ready(fields: str) -> None:
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton router ready {fields}", flush=True)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # nobody has to read it
        print(f"baton router: {text}", file=sys.stderr, flush=True)
