"""One child process of the launcher, with small programs that live and die as told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from baton.children import Child

ROOT = Path(__file__).parents[2]
READY = "print('baton x ready http=http://h:1 name=n', flush=True)"


@asynccontextmanager
async def child(program: str) -> AsyncIterator[Child]:
    made = Child("kid", [sys.executable, "-c", textwrap.dedent(program)], dict(os.environ))
    await made.start()
    try:
        async with asyncio.timeout(30):
            yield made
    finally:
        await made.stop(0)
        assert not psutil.pid_exists(made.pid), "not even a zombie"


def test_the_fields_of_its_ready_line() -> None:
    async def scenario() -> None:
        async with child(f"print('warming up', flush=True); {READY}; input()") as kid:
            assert await kid.ready() == {"http": "http://h:1", "name": "n"}
            assert await kid.ready() == {"http": "http://h:1", "name": "n"}
            assert await kid.wait() == 1, "there is nothing on its stdin"

    asyncio.run(scenario())


def test_it_dies_before_it_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        program = "import sys; print('no model there', file=sys.stderr); sys.exit(3)"
        async with child(program) as kid:
            assert await kid.ready() is None
            assert kid.obituary() == "kid ended with 3: no model there"

    asyncio.run(scenario())
    assert capsys.readouterr().err == "no model there\n"


def test_it_is_killed() -> None:
    async def scenario() -> None:
        async with child(f"{READY}; import time; time.sleep(60)") as kid:
            await kid.ready()
            os.kill(kid.pid, signal.SIGKILL)
            assert await kid.wait() == -signal.SIGKILL
            assert kid.obituary() == "kid was killed by SIGKILL"
            await kid.stop(1)

    asyncio.run(scenario())


def test_it_stops_when_asked() -> None:
    async def scenario() -> None:
        program = f"""
            import signal, sys, time
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            {READY}
            time.sleep(60)
        """
        async with child(program) as kid:
            await kid.ready()
            await kid.stop(30)
            assert await kid.wait() == 0

    asyncio.run(scenario())


def test_it_is_killed_when_it_does_not_stop() -> None:
    async def scenario() -> None:
        program = f"""
            import signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            {READY}
            time.sleep(60)
        """
        async with child(program) as kid:
            await kid.ready()
            await kid.stop(0.05)
            assert await kid.wait() == -signal.SIGKILL

    asyncio.run(scenario())


def test_it_can_be_killed_while_somebody_waits_for_its_end() -> None:
    async def scenario() -> None:
        program = f"""
            import signal, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            {READY}
            time.sleep(60)
        """
        async with child(program) as kid:
            await kid.ready()
            stopping = asyncio.create_task(kid.stop(60))
            await asyncio.sleep(0)
            kid.kill()
            await stopping
            kid.kill()

    asyncio.run(scenario())


def test_ctrl_c_is_the_launchers_business() -> None:
    async def scenario() -> None:
        program = f"""
            import signal
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            {READY}
        """
        async with child(program) as kid:
            assert await kid.ready() is not None

    asyncio.run(scenario())


def test_whatever_it_says_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """An unread pipe would stop it: lines without an end, bytes that are no text."""

    async def scenario() -> None:
        program = f"""
            import os
            os.write(2, b"x" * 300_000 + b"\\n\\xff\\xfe\\n")
            os.write(1, b"y" * 300_000 + b"\\n")
            os.write(2, b"z" * 300_000)
            {READY}
            os.write(2, b"\\nthe end, without a line break")
        """
        async with child(program) as kid:
            assert await kid.ready() is not None
            assert await kid.wait() == 0
            assert kid.obituary() == "kid ended with 0: the end, without a line break"

    asyncio.run(scenario())
    assert "\ufffd\ufffd\n" in capsys.readouterr().err


def test_nobody_need_read_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    async def scenario() -> None:
        program = f"import os; os.write(2, b'line\\n' * 50_000); {READY}"
        async with child(program) as kid:
            assert await kid.ready() is not None
            assert await kid.wait() == 0

    monkeypatch.setattr(sys, "stderr", Closed())
    asyncio.run(scenario())


def test_waiting_may_be_given_up_without_losing_its_last_words() -> None:
    async def scenario() -> None:
        async with child(f"{READY}; import sys; sys.exit('last words')") as kid:
            assert await kid.ready() is not None
            for _ in range(20):
                waiting = asyncio.create_task(kid.wait())
                await asyncio.sleep(0.005)
                waiting.cancel()
            assert await kid.wait() == 1
            assert kid.obituary() == "kid ended with 1: last words"

    asyncio.run(scenario())


LAUNCHER = """
import asyncio, os, sys
from baton.children import Child

async def main():
    kid = Child("kid", [sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    await kid.start()
    print(kid.pid, flush=True)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


def test_it_does_not_outlive_its_launcher() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    with_pid = int(done.stdout)
    if psutil.pid_exists(with_pid):
        _, alive = psutil.wait_procs([psutil.Process(with_pid)], timeout=30)
        assert not alive


@pytest.mark.parametrize(("parent", "code"), [("os.getppid()", 0), ("os.getppid() + 1", 1)])
def test_it_ends_at_once_if_its_launcher_is_gone_already(parent: str, code: int) -> None:
    """The launcher may die between the fork and the wish to be told."""
    program = f"import os; from baton.children import _stay_with; _stay_with({parent})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60)
    assert done.returncode == code
