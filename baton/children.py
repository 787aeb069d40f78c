"""One child process of the launcher: its lines, its readiness, its end.

Children stay in the launcher's process group and ignore Ctrl-C: the launcher ends them, in order.
If the launcher itself is killed, the kernel ends them (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

_PR_SET_PDEATHSIG = 1
_LAST_LINES = 20
_MAX_LINE = 1 << 16  # bytes; of a longer one only the end is shown
_LIBC = ctypes.CDLL(None)  # loaded here: between fork and exec as little as possible may happen


class Child:
    """A process that prints one line with "ready" on stdout, then serves until SIGTERM.

    Args:
        name: shown in front of messages about it.
        argv: the command.
        env: its environment.
    """

    def __init__(self, name: str, argv: Sequence[str], env: dict[str, str]) -> None:
        self.name = name
        self._argv = argv
        self._env = env
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._fields: dict[str, str] = {}
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._argv,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            preexec_fn=partial(_stay_with, os.getpid()),
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._tasks = [
            asyncio.create_task(self._read_ready(self._process.stdout)),
            asyncio.create_task(self._forward(self._process.stderr)),
        ]

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    async def ready(self) -> dict[str, str] | None:
        """The fields of its ready line (http=…, control=…), or None if it ended before."""
        waits = [asyncio.create_task(self._ready.wait()), asyncio.create_task(self.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return self._fields if self._ready.is_set() else None

    async def wait(self) -> int:
        """Its exit code, once it has ended and everything it said was read."""
        assert self._process is not None, "not started"
        code = await self._process.wait()
        await asyncio.wait(self._tasks)  # not `gather`: who stops waiting must not stop the reading
        return code

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM, then SIGKILL after the timeout."""
        if self._process is None or self._process.returncode is not None:
            return
        try:
            self._process.terminate()
            async with asyncio.timeout(timeout_s):
                await self.wait()
        except ProcessLookupError:  # it has ended just now
            await self.wait()
        except TimeoutError:
            self.kill()
            await self.wait()

    def kill(self) -> None:
        """SIGKILL; whoever waits for its end goes on."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):  # it has ended just now
                self._process.kill()

    def obituary(self) -> str:
        """How it ended, with its last words."""
        assert self._process is not None, "not started"
        code = self._process.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        last = self._last_lines[-1] if self._last_lines else ""
        return f"{self.name} {how}" + (f": {last}" if last else "")

    async def _read_ready(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            words = line.split()
            if "ready" in words:
                self._fields = dict(word.split("=", 1) for word in words if "=" in word)
                self._ready.set()

    async def _forward(self, stream: asyncio.StreamReader) -> None:
        async for line in _lines(stream):
            self._last_lines.append(line)
            with suppress(BrokenPipeError):  # nobody has to read it, but the pipe must be emptied
                print(line, file=sys.stderr, flush=True)


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines of any length and content; StreamReader's own end at a line that is too long."""
    rest = b""
    while chunk := await stream.read(_MAX_LINE):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield _text(line)
        rest = rest[-_MAX_LINE:]
    if rest:
        yield _text(rest)


def _text(line: bytes) -> str:
    return line[-_MAX_LINE:].decode(errors="replace").rstrip()


def _stay_with(parent: int) -> None:
    """Runs in the child before its program: leave Ctrl-C to the parent, end when it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before the kernel knew that this matters
        os._exit(1)
