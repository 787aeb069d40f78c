"""`baton router --workers 2` as processes: one port, one account, and deaths that pass."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from baton.router import main
from benchmarks.stub_pair import Script, StubPair
from tests.router import tiny_tokenizer
from tests.router.harness import MODEL, alphabet, endless
from wire.request_messages import Prefill

pytestmark = pytest.mark.timeout(180)

COMMAND = (sys.executable, "-m", "baton", "router", "--workers", "2")
FREE = ("--port", "0", "--control-port", "0", "--heartbeat-s", "0.1", "--node-timeout-s", "2")


@dataclass
class Group:
    """The launcher, its workers, and a pair of stub nodes at each."""

    process: subprocess.Popen[str]
    fields: dict[str, str]
    pairs: list[StubPair] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.fields["http"]

    @property
    def ports(self) -> list[int]:
        """The HTTP port and the control ports."""
        http = int(self.url.rpartition(":")[2])
        return [http, *self.pairs[0].prefill.control_ports]

    @property
    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def add_pair(self, control: str, script: Script) -> StubPair:
        pair = StubPair(control, script, MODEL, tiny_tokenizer.files())
        self.pairs.append(pair)
        async with asyncio.timeout(60):
            await pair.ready()
        return pair

    async def get(self, path: str) -> tuple[int, str]:
        """Over a connection of its own: whichever worker gets it."""
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return answer.status, await answer.text()

    async def json(self, path: str) -> Any:
        return json.loads((await self.get(path))[1])

    async def stream(self, num_tokens: int = 10) -> str:
        body = {"prompt": "hi", "stream": True, "max_tokens": num_tokens}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.url + "/v1/completions", json=body) as answer,
        ):
            assert answer.status == 200, await answer.text()
            *events, done = (await answer.text()).strip().split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        return "".join(c["text"] for chunk in chunks for c in chunk["choices"])

    async def metrics(self) -> dict[str, float]:
        lines = (await self.get("/metrics"))[1].splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(60):
            while not await holds():  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, 60)


def launch(flags: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *FREE, *flags], stdout=subprocess.PIPE, text=True)


@asynccontextmanager
async def group(script: Script = endless, *flags: str) -> AsyncIterator[Group]:
    process = launch(flags)
    assert process.stdout is not None
    made: Group | None = None
    try:
        line = await asyncio.to_thread(process.stdout.readline)
        assert line.startswith("baton router ready "), line
        made = Group(process, dict(word.split("=", 1) for word in line.split() if "=" in word))
        first = await made.add_pair(made.fields["control"], script)
        host = made.fields["control"].rpartition(":")[0]
        for port in first.prefill.control_ports[1:]:
            await made.add_pair(f"{host}:{port}", script)
        assert len(made.pairs) == 2

        async def all_have_registered() -> bool:
            serving = [(await made.json("/ready"))["ready"] for _ in range(8)]
            return all(serving)

        await made.until(all_have_registered)
        yield made
    finally:
        for pair in [] if made is None else made.pairs:
            await pair.close()
        if process.poll() is None:
            process.terminate()
        await asyncio.to_thread(process.wait, 60)
        process.stdout.close()


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def served(pair: StubPair) -> int:
    return sum(isinstance(message, Prefill) for message in pair.prefill.received)


def test_streams_spread_and_are_told_as_one_router_s() -> None:
    async def scenario() -> None:
        async with group() as g:
            texts = await asyncio.gather(*(g.stream() for _ in range(50)))
            assert set(texts) == {alphabet(10)}
            shares = [served(pair) for pair in g.pairs]
            assert sum(shares) == 50
            assert min(shares) > 0, "SO_REUSEPORT gives all connections to one with odds of 2^-49"
            for _ in range(4):  # whoever answers
                told = await g.metrics()
                assert (
                    told['vllm:request_success_total{finished_reason="length",model_name="stub"}']
                    == 50
                )
                assert told['vllm:generation_tokens_total{model_name="stub"}'] == 500
                assert (
                    told[
                        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}'
                    ]
                    == 50
                )
                assert told['vllm:time_to_first_token_seconds_count{model_name="stub"}'] == 50
                assert (
                    told['vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="stub"}']
                    == 50
                )
                assert told['baton_router_nodes{role="decode",state="serving"}'] == 1
                assert told["baton_router_workers"] == 2
                assert told["baton_router_streams"] == 0
            await _debug_pages_know_all(g)
            assert await g.json("/load") == {"server_load": 0}
            await _a_response_is_found_by_all(g)

    asyncio.run(scenario())


async def _a_response_is_found_by_all(g: Group) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            g.url + "/v1/responses", json={"input": "hi", "max_output_tokens": 4}
        ) as answer,
    ):
        id = (await answer.json())["id"]
    found = [(await g.get(f"/v1/responses/{id}"))[0] for _ in range(16)]
    assert set(found) == {200}, "one of two workers is not asked with odds of 2^-15"


async def _debug_pages_know_all(g: Group) -> None:
    listed = (await g.json("/debug/requests"))["requests"]
    assert len(listed) == len({entry["id"] for entry in listed}) == 50
    arrivals = [entry["arrived_at"] for entry in listed]
    assert arrivals == sorted(arrivals, reverse=True)
    for entry in listed[:10]:
        assert (await g.json(f"/debug/requests/{entry['id']}"))["id"] == entry["id"]
    status, text = await g.get(f"/debug/requests/{listed[0]['id']}-0?format=text")
    assert status == 200
    assert "choice 0" in text
    assert len((await g.get("/debug/requests?format=text"))[1].splitlines()) == 51
    assert (await g.get("/debug/requests/nobody"))[0] == 404
    assert (await g.get("/debug/requests?format=xml"))[0] == 400


def test_one_that_is_killed_comes_back_and_the_other_goes_on() -> None:
    async def scenario() -> None:
        async with group() as g:
            await asyncio.gather(*(g.stream() for _ in range(20)))
            before = await g.metrics()
            for pair in g.pairs:
                pair._step_s = 0.02
            streams = [asyncio.create_task(g.stream(100)) for _ in range(20)]
            await g.until(lambda: _load_is(g, 20))
            victim, survivor = g.workers
            os.kill(victim, signal.SIGKILL)
            results = await asyncio.gather(*streams, return_exceptions=True)
            right = [text for text in results if text == alphabet(100)]
            lost = [error for error in results if isinstance(error, aiohttp.ClientError)]
            assert right
            assert lost, "those of the victim"
            assert len(right) + len(lost) == 20
            while (await g.metrics())["baton_router_workers"] < 2:  # all the time somebody serves
                assert await g.stream() == alphabet(10)
            assert survivor in g.workers
            assert victim not in g.workers
            after = await g.metrics()
            assert after["baton_router_worker_restarts_total"] == 1
            fallen = {
                name
                for name in before
                if re.search("_total|_count|_sum|_bucket", name) and after[name] < before[name]
            }
            assert not fallen
            await g.until(lambda: _metric_is(g, "baton_router_streams", 0))
            await _both_serve(g)

    asyncio.run(scenario())


async def _load_is(g: Group, number: int) -> bool:
    return bool((await g.json("/load"))["server_load"] == number)


async def _metric_is(g: Group, name: str, value: float) -> bool:
    return (await g.metrics()).get(name) == value


async def _both_serve(g: Group) -> None:
    """The nodes have found the new life at the old control port."""

    async def ready_everywhere() -> bool:
        return all([(await g.json("/ready"))["ready"] for _ in range(10)])

    await g.until(ready_everywhere)
    before = [served(pair) for pair in g.pairs]
    texts = await asyncio.gather(*(g.stream() for _ in range(30)))
    assert set(texts) == {alphabet(10)}
    after = [served(pair) for pair in g.pairs]
    assert all(a > b for a, b in zip(after, before, strict=True))


def test_at_the_end_streams_are_finished_and_the_ports_are_free() -> None:
    async def scenario() -> None:
        async with group() as g:
            for pair in g.pairs:
                pair._step_s = 0.02
            streams = [asyncio.create_task(g.stream(50)) for _ in range(8)]
            await g.until(lambda: _load_is(g, 8))
            ports, workers = g.ports, g.workers
            assert await g.end() == 0
            assert set(await asyncio.gather(*streams)) == {alphabet(50)}
            assert len(ports) == 3
            for port in ports:
                socket.create_server(("127.0.0.1", port)).close()
            assert not living(workers)

    asyncio.run(scenario())


def test_workers_end_with_their_launcher() -> None:
    async def scenario() -> None:
        async with group() as g:
            workers = g.workers
            assert len(workers) == 2
            g.process.kill()

            async def all_gone() -> bool:
                return not living(workers)

            await g.until(all_gone)

    asyncio.run(scenario())


def test_keys_and_limits_hold_on_every_worker() -> None:
    async def scenario() -> None:
        flags = ("--api-key", "secret", "--requests-per-minute", "9")
        async with group(endless, *flags) as g:
            for _ in range(8):
                assert (await g.get("/debug/requests"))[0] == 401
                assert (await g.get("/load"))[0] == 401
                assert (await g.get("/metrics"))[0] == 200
            headers = {"Authorization": "Bearer secret"}
            body = {"prompt": "hi", "max_tokens": 1}
            statuses, limits = [], set()
            began = time.monotonic()
            for _ in range(40):
                async with (
                    aiohttp.ClientSession(headers=headers) as session,
                    session.post(g.url + "/v1/completions", json=body) as answer,
                ):
                    statuses.append(answer.status)
                    limits.add(answer.headers["x-ratelimit-limit-requests"])
            assert limits == {"9"}
            passed_s = time.monotonic() - began
            assert 9 <= statuses.count(200) <= 9 + passed_s * 9 / 60

    asyncio.run(scenario())


@pytest.mark.parametrize("which", ["http", "control"])
def test_a_port_that_another_router_has_is_refused(which: str) -> None:
    """Although SO_REUSEPORT would let this user's processes share it."""

    async def scenario() -> None:
        async with group() as g:
            http, control = g.ports[:2]
            chosen = ["--port", str(http)] if which == "http" else ["--control-port", str(control)]
            process = await asyncio.create_subprocess_exec(
                *COMMAND, *FREE, *chosen, stderr=asyncio.subprocess.PIPE
            )
            _, said = await process.communicate()
            assert process.returncode == 1
            (line,) = said.decode().splitlines()
            assert line.startswith(f"baton router: cannot listen on 127.0.0.1:{chosen[1]}: ")

    asyncio.run(scenario())


def test_one_line_for_what_cannot_work(tmp_path: Path) -> None:
    for flags, expected in (
        (["--workers", "0"], "--workers must be between 1 and"),
        (["--workers", "65"], "--workers must be between 1 and"),
        (["--workers", "2", "--control-port", "65535"], "there are no 2 ports from 65535 on"),
        (["--workers", "2", "--host", "0.0.0.0"], "give API keys"),
    ):
        run = subprocess.run(
            [sys.executable, "-m", "baton", "router", "--port", "0", *flags],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert run.returncode == 1
        (line,) = run.stderr.splitlines()
        assert line.startswith("baton router: ")
        assert expected in line


def test_workers_that_cannot_start_are_the_launcher_s_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ["--workers", "2", "--port", "0", "--control-port", "0"]
    assert main([*flags, "--tokenizer", str(tmp_path)]) == 1
    said = capfd.readouterr().err
    assert "cannot read the tokenizer" in said
    assert "router-0 ended with 1" in said
