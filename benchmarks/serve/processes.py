"""Starts the processes that a benchmark measures, waits for their ready line, ends them for sure.

Each gets its own session, so that one signal reaches everything it has started; its output goes to
a file, which is shown if it fails.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATON = Path(sys.executable).with_name("baton")
POLL_S = 0.01
STOP_S = 20.0


class ProcessFailed(Exception):
    """A process ended or did not become ready; the text has the end of its output."""


@dataclass(frozen=True, slots=True)
class Running:
    """A started process and the file that takes its output."""

    popen: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.popen.pid

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match of `pattern` in the output.

        Raises:
            ProcessFailed: the process ended or the time is up before there was one.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            ended = self.popen.poll() is not None  # before reading: its last words count
            if match := re.search(pattern, self._output(), re.MULTILINE):
                return match
            if ended or time.monotonic() > deadline:
                state = "ended" if ended else f"not ready after {timeout_s:g} s"
                tail = self._output()[-2000:]
                raise ProcessFailed(f"{self.popen.args!r} {state}; its output ends with:\n{tail}")
            time.sleep(POLL_S)

    def _output(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[Running]:
    """Run `command` at the root of the repository; it and its children are gone afterwards."""
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Running(popen, log)
    finally:
        _stop(popen)


def _stop(popen: subprocess.Popen[bytes]) -> None:
    """Ask the process to end, then end the whole session."""
    popen.send_signal(signal.SIGINT)
    try:
        popen.wait(STOP_S)
    except subprocess.TimeoutExpired:
        print(f"{popen.args!r} did not stop within {STOP_S:g} s; killed", file=sys.stderr)
    with suppress(ProcessLookupError):  # the rule: nobody is left
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
