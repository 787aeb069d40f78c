"""`baton run-batch` against a small server: its files, killed runs, its exit codes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from baton.run_batch import main
from tuner.batch import backoff_s
from tuner.batch_file import BatchRequest, parse_request
from wire.errors import ConfigError

ROOT = Path(__file__).parents[2]


class FakeServer:
    """Answers with the prompt; may be slow, busy, or break off."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.num_running = self.most_running = 0
        self.busy_first = 0  # so many answers to each prompt are 503
        self.break_first = 0  # so many end the connection
        self.delay_s = 0.0
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        prompt = (await request.json()).get("prompt", "")
        self.asked[prompt] += 1
        self.headers.append(dict(request.headers))
        if self.asked[prompt] <= self.break_first:
            assert request.transport is not None
            request.transport.abort()
        if self.asked[prompt] <= self.busy_first:
            return web.json_response({}, status=503, headers={"Retry-After": "0"})
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        await asyncio.sleep(self.delay_s)
        self.num_running -= 1
        if prompt.startswith("bad"):
            return web.json_response({"error": {"message": "no, bad"}}, status=400)
        if prompt.startswith("html"):
            return web.Response(text="<html>")
        return web.json_response({"text": prompt}, headers={"x-request-id": f"id-{prompt}"})


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """Runs in its own thread, because `main` owns this thread's event loop."""
    fake = FakeServer()
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", fake.answer)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.batch.backoff_s", lambda tried: 0.001)


class Batch:
    """The files of one batch."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output, self.errors = (folder / n for n in ("in", "out", "err"))

    def ask(self, *prompts: str) -> Batch:
        return self.write(*(line(prompt, prompt=prompt) for prompt in prompts))

    def write(self, *lines: str) -> Batch:
        self.input.write_text("".join(f"{text}\n" for text in lines))
        return self

    def argv(self, url: str, *flags: str) -> list[str]:
        return ["-i", str(self.input), "-o", str(self.output), "--url", url, *flags]

    def run(self, server: FakeServer, *flags: str) -> int:
        return main(self.argv(server.url, *flags))

    @property
    def results(self) -> list[dict[str, Any]]:
        return read(self.output)

    def by_id(self) -> dict[str, dict[str, Any]]:
        ids = [result["custom_id"] for result in self.results]
        assert len(set(ids)) == len(ids), "a line was done twice"
        return {result["custom_id"]: result for result in self.results}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def line(custom_id: str, url: str = "/v1/completions", method: str = "POST", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return Batch(tmp_path)


def names(count: int) -> list[str]:
    return [f"p{number}" for number in range(count)]


# ---------------------------------------------------------------- answers


def test_answers_in_the_format(server: FakeServer, batch: Batch, capsys: Any) -> None:
    assert batch.ask(*names(20)).run(server, "--concurrency", "4", "--api-key", "secret") == 0
    for name, result in batch.by_id().items():
        assert set(result) == {"id", "custom_id", "response", "error"}
        assert result["error"] is None
        expected = {"status_code": 200, "request_id": f"id-{name}", "body": {"text": name}}
        assert result["response"] == expected
    assert server.asked == dict.fromkeys(names(20), 1)
    assert 1 <= server.most_running <= 4
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "20 of 20 lines answered, 0 failed" in capsys.readouterr().err


def test_failures_have_their_exit_code_and_file(
    server: FakeServer, batch: Batch, capsys: Any
) -> None:
    batch.ask("good", "bad", "html")
    assert batch.run(server, "-e", str(batch.errors)) == 3
    assert set(batch.by_id()) == {"good"}
    bad, html = sorted(read(batch.errors), key=lambda result: str(result["custom_id"]))
    assert bad["response"]["status_code"] == 400
    assert bad["error"] is None
    assert html["response"] is None
    assert html["error"]["code"] == "invalid_answer"
    assert "1 of 3 lines answered, 2 failed" in capsys.readouterr().err
    assert batch.run(server, "-e", str(batch.errors)) == 3, "known failures count again"
    assert server.asked == {"good": 1, "bad": 1, "html": 1}


BAD_LINES = [
    ("{", "invalid_json_line"),
    ("[]", "invalid_json_line"),
    ("[" * 100_000, "invalid_json_line"),
    ('{"custom_id": 5}', "missing_required_parameter"),
    ('{"custom_id": ""}', "missing_required_parameter"),
    (line("x", method="GET"), "invalid_method"),
    (line("x", url="/v1/models"), "invalid_url"),
    (line("x", url="http://elsewhere/v1/completions"), "invalid_url"),
    (line("x", stream=True), "invalid_request"),
    ('{"custom_id": "x", "method": "POST", "url": ["a"], "body": {}}', "invalid_url"),
    (
        '{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": []}',
        "missing_required_parameter",
    ),
    (line("x")[:-1] + ', "more": 1}', "unknown_parameter"),
]


@pytest.mark.parametrize(("text", "code"), BAD_LINES, ids=lambda value: str(value)[:30])
def test_bad_lines(text: str, code: str) -> None:
    bad = parse_request(7, text.encode())
    assert not isinstance(bad, BatchRequest)
    assert (bad.line, bad.code) == (7, code)
    assert "line 7" in bad.message


def test_bad_lines_are_told_with_their_number_and_only_once(
    server: FakeServer, batch: Batch
) -> None:
    batch.write(
        line("a", prompt="a"),
        "nope",
        "",
        line("a", prompt="again"),
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1"),
    )
    for _ in range(2):
        assert batch.run(server) == 3
        told = {r["error"]["line"]: r["error"]["code"] for r in batch.results if r["error"]}
        assert told == {2: "invalid_json_line", 4: "duplicate_custom_id", 5: "invalid_json_line"}
        assert len(batch.results) == 4
    assert server.asked == {"a": 1}


def test_a_reported_duplicate_does_not_hide_the_line_it_repeats(
    server: FakeServer, batch: Batch
) -> None:
    batch.write(line("a", prompt="a"), line("a", prompt="again"))
    error = {"code": "duplicate_custom_id", "message": "line 2", "line": 2}
    result = {"id": "batch_req_1", "custom_id": "a", "response": None, "error": error}
    batch.output.write_text(json.dumps(result) + "\n")
    assert batch.run(server) == 3
    assert server.asked == {"a": 1}


def test_only_bad_lines_is_exit_1(server: FakeServer, batch: Batch, capsys: Any) -> None:
    assert batch.write("nope", "{}").run(server) == 1
    assert "line 1: not valid JSON" in capsys.readouterr().err


# ---------------------------------------------------------------- a server that is busy or gone


def test_a_busy_server_is_asked_again(server: FakeServer, batch: Batch) -> None:
    server.busy_first = server.break_first = 2
    assert batch.ask(*names(5)).run(server) == 0
    assert server.asked == dict.fromkeys(names(5), 3)


def test_what_stays_busy_fails_and_may_be_tried_again(server: FakeServer, batch: Batch) -> None:
    server.busy_first = 3
    batch.ask("a", "bad").run(server, "--max-retries", "1")
    assert batch.by_id()["a"]["response"]["status_code"] == 503
    assert batch.run(server, "--retry-failed") == 3
    assert batch.by_id()["a"]["response"]["status_code"] == 200
    assert batch.by_id()["bad"]["response"]["status_code"] == 400
    assert server.asked == {"a": 4, "bad": 4}


def test_a_slow_answer_is_given_up(server: FakeServer, batch: Batch) -> None:
    server.delay_s = 30
    assert batch.ask("a").run(server, "--timeout-s", "0.2") == 1
    assert batch.by_id()["a"]["error"]["code"] == "request_timeout"


def test_nobody_there_leaves_the_lines_undone(batch: Batch) -> None:
    batch.ask("a", "b")
    with pytest.raises(ConfigError, match=r"cannot reach http://127.0.0.1:1: Connection refused"):
        main(batch.argv("http://127.0.0.1:1", "--max-retries", "2"))
    assert batch.results == []


def test_backoff_grows_and_ends() -> None:
    assert [backoff_s(tried, lambda: 1.0) for tried in (0, 1, 2, 9)] == [0.5, 1.0, 2.0, 60.0]
    assert backoff_s(10**6, lambda: 0.0) == 30.0


# ---------------------------------------------------------------- killed, and gone on


def test_killed_in_the_middle_it_goes_on(server: FakeServer, batch: Batch) -> None:
    server.delay_s = 0.05
    batch.ask(*names(200))
    argv = [sys.executable, "-m", "baton", "run-batch", *batch.argv(server.url)]
    process = subprocess.Popen([*argv, "--concurrency", "4"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (batch.output.exists() and len(batch.output.read_bytes().splitlines()) > 20):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    known = {result["custom_id"] for result in batch.results[:-1]}
    assert 20 <= len(known) < 200
    os.truncate(batch.output, batch.output.stat().st_size - 9)  # as if killed while it wrote
    before = Counter(server.asked)
    server.delay_s = 0.0
    assert batch.run(server) == 0
    assert set(batch.by_id()) == set(names(200))
    asked_again = {name for name in known if server.asked[name] > before[name]}
    assert not asked_again


def test_ctrl_c_is_130_and_keeps_what_is_done(server: FakeServer, batch: Batch) -> None:
    server.delay_s = 0.05
    batch.ask(*names(100))
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    assert batch.run(server, "--concurrency", "1") == 130
    timer.join()
    assert len(batch.by_id()) < 100
    server.delay_s = 0.0
    assert batch.run(server) == 0
    assert set(batch.by_id()) == set(names(100))


def test_one_run_at_a_time(server: FakeServer, batch: Batch) -> None:
    with batch.ask("a").output.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="in use by another run-batch"):
            batch.run(server)
    assert not server.asked


def test_a_file_that_is_no_output_is_left_alone(server: FakeServer, batch: Batch) -> None:
    batch.ask("a").output.write_text("dear diary\nand more\n")
    with pytest.raises(ConfigError, match="line 1 is no result of a batch"):
        batch.run(server)
    assert batch.output.read_text() == "dear diary\nand more\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-i", "nowhere", "-o", "out", "--url", "http://x"], "cannot read nowhere"),
        (["-i", "in", "-o", "in", "--url", "http://x"], "is the input"),
        (["-i", "empty", "-o", "out", "--url", "http://x"], "has no requests"),
        (["-i", "in", "-o", "no/where", "--url", "http://x"], "cannot write no/where"),
        (["-i", "in", "-o", "out", "--api-key", "k"], "--api-key is for the server"),
        (["-i", "in", "-o", "out", "./no-model"], "there is no model folder"),
        (["-i", "in", "-o", "out", "--url", "nonsense"], "not a URL"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_text(line("a", prompt="a") + "\n")
    Path("empty").write_text("\n\n")
    with pytest.raises(ConfigError, match=message):
        main(flags)
