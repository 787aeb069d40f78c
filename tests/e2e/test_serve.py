"""`baton serve` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil
import pytest

from tests.e2e.fleet import ROOT
from tests.engine.tiny_heads import save_eagle_for_bundled
from wire.fleet_key import make_key, write_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


class Serve:
    """One `baton serve` process; its output is in files so that no pipe fills."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.out = folder / "out"
        self.err = folder / "err"
        env = dict(os.environ, PYTHONPATH=str(ROOT))
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "baton", "serve", "--kv-memory", "64M", *flags],
                stdout=_file(out),
                stderr=_file(err),
                env=env,
                cwd=folder,
            )

    def wait_ready(self) -> str:
        """The URL in its ready line."""
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            for line in self.out.read_text().splitlines():
                if line.startswith("baton ready "):
                    return line.split()[2]
            assert self.process.poll() is None, self.err.read_text()
            time.sleep(0.05)
        raise AssertionError(self.err.read_text())

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=60)


def _file(stream: IO[bytes]) -> int:
    return stream.fileno()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in ("out", "err"):
        if (tmp_path / name).exists():
            print(f"--- {name}\n{(tmp_path / name).read_text()}")


def complete(url: str, prompt: str, headers: dict[str, str] | None = None) -> str:
    body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", **(headers or {})},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = json.load(response)["choices"][0]["text"]
        return text


def test_one_command_serves_survives_a_dead_node_and_stops(folder: Path) -> None:
    head = {"method": "eagle", "model": save_eagle_for_bundled(folder / "head").name}
    serve = Serve(folder, "--port", "0", "--speculative-config", json.dumps(head))
    try:
        url = serve.wait_ready()
        first = complete(url, "import os\n\ndef ")
        assert first
        node = next(p for p in serve.children() if "baton.node decode" in " ".join(p.cmdline()))
        node.kill()
        deadline = time.monotonic() + 60
        while "starting it again" not in serve.err.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert complete(url, "import os\n\ndef ") == first  # waits for the node to be back
        children = serve.children()
        assert len(children) == 3
        assert serve.stop() == 0
        assert not any(child.is_running() for child in children)
    finally:
        serve.process.kill()
        serve.process.wait()


def test_several_workers_with_every_kind_of_key(folder: Path) -> None:
    """Nodes find the second worker by themselves, and again when it was killed."""
    write_key(make_key(), folder / "fleet.key")
    flags = ("--workers", "2", "--key-file", str(folder / "fleet.key"), "--api-key", "secret")
    serve = Serve(folder, "--port", "0", *flags)
    try:
        url = serve.wait_ready()
        headers = {"Authorization": "Bearer secret"}
        first = complete(url, "import os\n\ndef ", headers)
        assert first
        assert len(serve.children()) == 5, "a launcher of two routers, and two nodes"
        wait_for(lambda: on_every_worker(url, lambda: get(url, "/ready")[0] == 200))
        assert get(url, "/debug/requests")[0] == 401
        status, told = get(url, "/debug/requests", headers)
        assert status == 200
        assert len(json.loads(told)["requests"]) == 1
        victim = next(p for p in serve.children() if "--place" in " ".join(p.cmdline()))
        victim.kill()
        for _ in range(20):
            with suppress(ConnectionError):  # of what the victim had not accepted yet
                assert complete(url, "import os\n\ndef ", headers) == first
        wait_for(lambda: "baton_router_workers 2.0" in get(url, "/metrics")[1])
        wait_for(lambda: on_every_worker(url, lambda: get(url, "/ready")[0] == 200))
        assert complete(url, "import os\n\ndef ", headers) == first
        assert serve.stop() == 0
    finally:
        serve.process.kill()
        serve.process.wait()


def on_every_worker(url: str, holds: Callable[[], bool]) -> bool:
    """Over so many connections that each of two workers has got one."""
    return all(holds() for _ in range(12))


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def get(url: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url + path, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_children_end_with_a_killed_launcher(folder: Path) -> None:
    serve = Serve(folder, "--port", "0")
    serve.wait_ready()
    children = serve.children()
    assert len(children) == 3
    serve.process.kill()
    serve.process.wait()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert len(gone) == 3
    assert not alive


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("/no/such/model",), "there is no model folder '/no/such/model'"),
        (("--host", "0.0.0.0"), "--insecure"),
        (("--prefill", "-1"), "at least 0"),
        (("--decode", "0"), "give --decode, --mixed or --flex"),
        (("--block-size", "0"), "--block-size must be"),
        (("--kv-memory", "1k"), "holds no block"),
    ],
)
def test_mistakes_get_one_clear_line(folder: Path, flags: tuple[str, ...], message: str) -> None:
    serve = Serve(folder, "--port", "0", *flags)
    assert serve.process.wait(timeout=90) != 0
    said = serve.err.read_text()
    assert message in said
    assert "Traceback" not in said


def test_a_port_in_use_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        serve = Serve(folder, "--port", str(port))
        assert serve.process.wait(timeout=90) != 0
    said = serve.err.read_text()
    assert str(port) in said
    assert "in use" in said
    assert "Traceback" not in said
