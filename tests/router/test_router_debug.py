"""Where a request's time went: Server-Timing, /debug/requests and the metrics tell the same."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_writer import StreamWriter
from aiohttp.test_utils import make_mocked_request

from router.access_config import AccessConfig
from router.event_stream import EventStream
from tests.router.harness import Answer, Harness, alphabet, endless, eventually, router
from tests.router.test_router_app import completion_text
from wire.request_messages import (
    AttemptFailed,
    HandoffDone,
    Prefill,
    PrefillTiming,
    TransferRecord,
)

TIMING = PrefillTiming(queue_s=0.0, compute_s=0.0, num_steps=2)
TO_FIRST_TOKEN = {
    "read",
    "tokenize",
    "queue",
    "reserve",
    "prefill-queue",
    "prefill",
    "network",
    "retry",
}


def server_timing(answer: Answer) -> list[tuple[str, Decimal]]:
    entries = answer.headers["Server-Timing"].split(", ")
    matches = [re.fullmatch(r"([a-z-]+);dur=(\d+\.\d{3})", entry) for entry in entries]
    return [(match[1], Decimal(match[2])) for match in matches if match is not None]


async def debug(harness: Harness, id: str) -> Any:
    answer = await harness.get(f"/debug/requests/{id}")
    assert answer.status == 200, answer.body
    return json.loads(answer.body, parse_float=Decimal)


async def metric(harness: Harness, name: str) -> Decimal:
    lines = (await harness.get("/metrics")).body.decode().splitlines()
    (value,) = [line.rpartition(" ")[2] for line in lines if line.startswith(f"{name}{{")]
    return Decimal(value)


def response_id(answer: Answer, stream: bool) -> str:
    return str(answer.events[0]["id"] if stream else answer.json["id"])


@pytest.mark.parametrize("stream", [True, False])
def test_header_pages_and_metrics_tell_the_same(stream: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.timing = TIMING
            answer = await harness.complete(max_tokens=5, stream=stream)
            told = await debug(harness, response_id(answer, stream))
            (choice,) = told["choices"]
            entries = server_timing(answer)
            at = [name for name, _ in entries].index("ttft")
            before, ttft = entries[:at], entries[at][1]
            assert {name for name, _ in before} <= TO_FIRST_TOKEN
            assert sum(dur for _, dur in before) == ttft == 1000 * told["ttft_s"]
            phases = choice["phases"]
            seconds = {entry["phase"]: entry["seconds"] for entry in phases}
            assert {name: dur / 1000 for name, dur in before} == {
                name: seconds[name] for name in seconds if name in TO_FIRST_TOKEN
            }
            assert sum(seconds.values()) == choice["total_s"]
            summed = await metric(harness, "vllm:time_to_first_token_seconds_sum")
            assert summed == told["ttft_s"]
            assert [choice["end"], choice["prompt_tokens"], choice["output_tokens"]] == [
                "length",
                2,
                5,
            ]
            after = [name for name, _ in entries[at + 1 :]]
            assert stream or after == ["handoff", "decode"]

    asyncio.run(scenario())


def test_a_dead_attempt_is_a_phase_of_its_own() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(max_tokens=5))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            (lost,) = harness.sent(Prefill)
            harness.pair.prefill_hangs = False
            harness.pair.prefill.send(AttemptFailed(lost.id, "my own words", "it broke", True))
            answer = await task
            assert answer.json["choices"][0]["text"] == alphabet(5)
            entries = dict(server_timing(answer))
            assert entries["retry"] > 0
            ttft = entries.pop("ttft")
            assert sum(dur for name, dur in entries.items() if name in TO_FIRST_TOKEN) == ttft
            (choice,) = (await debug(harness, answer.json["id"]))["choices"]
            first, second = choice["attempts"]
            assert (first["attempt"], first["cause"]) == (1, "other")
            assert (second["attempt"], second["cause"]) == (2, "finished")
            text = (await harness.get("/metrics")).body.decode()
            assert 'baton_router_attempts_ended_total{cause="other"} 1.0' in text
            assert "my own words" not in text

    asyncio.run(scenario())


def test_what_the_nodes_tell_is_shown() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.timing = replace(TIMING, compute_s=1e-4)
            answer = await harness.complete(max_tokens=5)
            id = answer.json["id"]
            (sent,) = harness.sent(Prefill)
            transfer = TransferRecord("shm", 2, 4096, 0.25, 2048, 0.125, 0.0625)
            harness.pair.prefill.send(HandoffDone(sent.id, transfer))

            async def attempt() -> Any:
                (choice,) = (await debug(harness, id))["choices"]
                return choice["attempts"][0]

            async with asyncio.timeout(10):
                while (await attempt())["transfer"] is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            told = await attempt()
            assert told["transfer"]["tail_bytes"] == 2048
            assert told["prefill_timing"]["num_steps"] == 2
            assert told["decode_messages"] >= 1
            assert told["prefill"].startswith("prefill#")
            assert (told["way"]["chosen"], told["way"]["reason"]) == ("handoff", "forced")
            text = (await harness.get(f"/debug/requests/{id}-0?format=text")).body.decode()
            assert "steps: 2" in text
            assert "by shm" in text
            assert "handed over (forced)" in text
            exposed = (await harness.get("/metrics")).body.decode()
            assert 'baton_router_ways_total{reason="forced",way="handoff"} 1.0' in exposed
            handoff = (await harness.get("/debug/fleet")).json["handoff"]
            assert handoff["mode"] == "always"
            assert handoff["pace"]["handoff"][0] == pytest.approx(0.0625)

    asyncio.run(scenario())


def test_running_and_finished_requests_are_listed() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            done = await harness.chat(max_tokens=3)
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(max_tokens=3, n=2))
            await eventually(lambda: len(harness.sent(Prefill)) == 2)
            running, finished = (await harness.get("/debug/requests")).json["requests"]
            assert (running["state"], running["ends"]) == ("running", [None, None])
            assert (finished["id"], finished["ends"]) == (done.json["id"], ["length"])
            told = await debug(harness, running["id"])
            assert told["choices"][0]["phases"][-1]["phase"] == "prefill"
            assert told["choices"][1]["attempts"] == []
            async with harness.session.get(
                harness.url + "/debug/requests", headers={"Accept": "text/plain"}
            ) as response:
                assert response.content_type == "text/plain"
                lines = (await response.text()).splitlines()
            assert len(lines) == 3
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await eventually(lambda: not len(harness.server.control.requests))
            requests = (await harness.get("/debug/requests")).json["requests"]
            assert [request["state"] for request in requests] == ["finished", "finished"]
            assert requests[0]["ends"] == ["abort", "abort"]

    asyncio.run(scenario())


def test_only_so_many_are_remembered() -> None:
    async def scenario() -> None:
        async with router(endless, debug_requests=3) as harness:
            answers = [await harness.complete(max_tokens=2) for _ in range(5)]
            listed = (await harness.get("/debug/requests")).json["requests"]
            assert [entry["id"] for entry in listed] == [a.json["id"] for a in answers[:1:-1]]
            unknown = await harness.get(f"/debug/requests/{answers[0].json['id']}")
            assert (unknown.status, unknown.error["code"]) == (404, "unknown_request")
            wrong = await harness.get("/debug/requests?format=xml")
            assert (wrong.status, wrong.error["param"]) == (400, "format")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "options", [{"debug_requests": 0}, {"host": "0.0.0.0", "insecure": True}], ids=["off", "public"]
)
def test_where_others_could_read_them_there_are_no_debug_pages(options: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with router(endless, **options) as harness:
            answer = await harness.complete(max_tokens=2)
            assert "Server-Timing" in answer.headers
            for path in ("/debug/requests", f"/debug/requests/{answer.json['id']}"):
                assert (await harness.get(path)).status == 404

    asyncio.run(scenario())


def test_keys_open_the_debug_pages_to_other_machines() -> None:
    async def scenario() -> None:
        access = AccessConfig(api_keys=("secret",))
        async with router(endless, host="0.0.0.0", access=access) as harness:
            url = harness.url + "/debug/requests"
            async with harness.session.get(url) as response:
                assert response.status == 401
            bearer = {"Authorization": "Bearer secret"}
            async with harness.session.get(url, headers=bearer) as response:
                assert (response.status, await response.json()) == (200, {"requests": []})

    asyncio.run(scenario())


# ---------------------------------------------------------------- when the status leaves


def test_a_slow_first_token_does_not_hold_the_status_for_ever() -> None:
    async def scenario() -> None:
        async with router(endless, hold_headers_s=0.05) as harness:
            harness.pair.prefill_hangs = True
            body = {"prompt": "hi", "max_tokens": 5, "stream": True}
            async with harness.session.post(harness.url + "/v1/completions", json=body) as response:
                assert response.status == 200  # there is no token yet
                assert "Server-Timing" not in response.headers
                (lost,) = harness.sent(Prefill)
                harness.pair.prefill_hangs = False
                harness.pair.prefill.send(AttemptFailed(lost.id, "transport", "lost", True))
                answer = Answer(200, {}, await response.read())
            assert completion_text(answer) == alphabet(5)

    asyncio.run(scenario())


def test_an_error_after_the_status_and_before_the_first_token_is_an_event() -> None:
    async def scenario() -> None:
        async with router(endless, hold_headers_s=0.0, queue_timeout_s=0.2) as harness:
            harness.pair.refuse_with = "capacity"
            answer = await harness.complete(stream=True)
            assert answer.status == 200
            (event,) = answer.events  # checks [DONE] too
            assert event["error"]["code"] == "no_capacity"

    asyncio.run(scenario())


def test_a_client_that_leaves_before_the_first_token_is_noticed() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(stream=True))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await eventually(lambda: not len(harness.server.control.requests))

    asyncio.run(scenario())


class Wire(asyncio.Transport):
    """Remembers what was written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.writes.append(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize(("with_event", "num_writes"), [(True, 1), (False, 2)])
def test_status_and_first_event_leave_together(with_event: bool, num_writes: int) -> None:
    """A packet less on the way to the first token."""

    async def scenario() -> None:
        loop, wire = asyncio.get_running_loop(), Wire()
        protocol = BaseProtocol(loop)
        protocol.connection_made(wire)
        request = make_mocked_request("POST", "/", writer=StreamWriter(protocol, loop))
        response = EventStream({"Server-Timing": "ttft;dur=1"}, with_event=with_event)
        await response.prepare(request)
        await response.write(b"data: x")
        assert len(wire.writes) == num_writes
        assert b"Server-Timing: ttft;dur=1" in wire.writes[0]
        assert b"data: x" in wire.writes[-1]

    asyncio.run(scenario())


# ---------------------------------------------------------------- small pages


def test_version_ping_and_load() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            assert (await harness.get("/version")).json["version"]
            for method in ("GET", "POST"):
                async with harness.session.request(method, harness.url + "/ping") as response:
                    assert (response.status, await response.read()) == (200, b"")
            assert (await harness.get("/load")).json == {"server_load": 0}
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete())
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            assert (await harness.get("/load")).json == {"server_load": 1}
            task.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError):
                await task
            await eventually(lambda: not harness.server.serving.num_requests)

    asyncio.run(scenario())
