"""What clients see when nodes die, refuse or lie, and when clients themselves leave."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import aiohttp
import pytest

from benchmarks.stub_node import StubNode
from benchmarks.stub_pair import StubPair
from router.breaker import Breaker, BreakerLimits, BreakerState, Pair
from router.event_stream import EventStream
from tests.router.harness import (
    Answer,
    Harness,
    alphabet,
    endless,
    eventually,
    router,
    saying,
)
from tests.router.test_router_app import completion_text
from wire.fleet_messages import Draining, Heartbeat
from wire.messages import Message
from wire.request_messages import (
    Abort,
    AttemptFailed,
    Prefill,
    Rebind,
    Resend,
    Reserve,
    Tokens,
    TokenUpdate,
)
from wire.types import FinishReason, NodeId, NodeLoad


async def is_quiet(harness: Harness) -> None:
    """Nothing runs any more, anywhere."""
    await eventually(lambda: not len(harness.server.control.requests))
    await eventually(lambda: all(not pair.running for pair in harness.pairs))


async def in_flight(harness: Harness, **fields: object) -> asyncio.Task[Answer]:
    """A stream whose decode node has produced something."""
    task = asyncio.create_task(harness.complete(stream=True, **fields))
    await eventually(lambda: any(p.running for p in harness.pairs))
    await eventually(
        lambda: any(run.num_sent > 5 for p in harness.pairs for run in p.running.values())
    )
    return task


def test_a_killed_decode_node_costs_time_and_no_text() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            task = await in_flight(harness, max_tokens=120)
            await harness.pair.decode.close()
            harness.pair.running.clear()
            await harness.add_pair(endless)
            answer = await task
            assert completion_text(answer) == alphabet(120)
            assert answer.events[-1]["choices"][0]["finish_reason"] == "length"
            retries = [message for message in harness.sent(Prefill) if message.id.attempt > 1]
            assert len(retries) >= 1
            assert len(retries[0].tokens) > retries[0].num_prompt_tokens == 2
            await is_quiet(harness)

    asyncio.run(scenario())


def test_a_killed_prefill_node_is_replaced_before_the_first_byte() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(max_tokens=20))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            other = await harness.add_pair(endless)
            await harness.pair.prefill.close()
            assert (await task).json["choices"][0]["text"] == alphabet(20)
            [rebind] = [m for m in harness.pair.decode.received if isinstance(m, Rebind)]
            assert (rebind.id.attempt, rebind.prefill) == (2, other.prefill.id)
            assert not any(isinstance(m, Abort) for m in harness.pair.decode.received)

    asyncio.run(scenario())


def break_way(pair: StubPair, to: NodeId, times: int = 1 << 30) -> None:
    """The prefill node's blocks do not reach `to`; after so many failures they do."""
    failures = 0

    def handle(message: Message) -> None:
        nonlocal failures
        lost = isinstance(message, Prefill) and message.grant and message.grant.decode == to
        if isinstance(message, Prefill) and lost and failures < times:
            failures += 1
            pair.prefill.send(AttemptFailed(message.id, "transport", "the way is broken", True))
        else:
            pair.on_prefill_message(message)

    pair.prefill.handle = handle


async def until_open(harness: Harness, limits: BreakerLimits) -> Breaker:
    """Two pairs, and the first one's blocks do not come through until its breaker opens."""
    await harness.add_pair(endless)
    breaker = harness.server.control.fleet.breaker = Breaker(limits)
    break_way(harness.pair, harness.pair.decode.id)
    while not breaker.num_open:
        assert (await harness.complete(max_tokens=5)).json["choices"][0]["text"] == alphabet(5)
    return breaker


def test_a_pair_that_hands_over_badly_gets_nothing_for_a_while() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            breaker = await until_open(harness, BreakerLimits(pause_s=1000))
            bad = Pair(harness.pair.prefill.id, harness.pair.decode.id)
            assert breaker.state(bad) is BreakerState.OPEN
            assert b"baton_router_open_pairs 1.0" in (await harness.get("/metrics")).body
            harness.pair.prefill.received.clear()
            await asyncio.gather(*(harness.complete(max_tokens=5) for _ in range(20)))
            grants = [m.grant for m in harness.pair.prefill.received if isinstance(m, Prefill)]
            assert grants, "the node itself goes on"
            assert all(grant and grant.decode != bad.decode for grant in grants)
            await is_quiet(harness)

    asyncio.run(scenario())


def test_a_trial_after_a_while_closes_the_breaker() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            breaker = await until_open(harness, BreakerLimits(pause_s=0.1))
            harness.pair.prefill.handle = harness.pair.on_prefill_message
            while breaker.num_open:
                await harness.complete(max_tokens=5)
            assert b"baton_router_open_pairs 0.0" in (await harness.get("/metrics")).body
            await is_quiet(harness)

    asyncio.run(scenario())


def test_the_only_pair_is_used_however_badly_it_hands_over() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            breaker = harness.server.control.fleet.breaker
            break_way(harness.pair, harness.pair.decode.id, times=4)
            answer = await harness.complete(max_tokens=5)
            assert answer.json["choices"][0]["text"] == alphabet(5)
            assert len(harness.sent(Prefill)) == 5
            assert breaker.num_open == 0, "the commit has closed it"
            await is_quiet(harness)

    asyncio.run(scenario())


def test_without_another_prefill_node_the_reservation_is_given_back() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(max_tokens=20))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            await harness.pair.prefill.close()
            await eventually(
                lambda: any(isinstance(m, Abort) for m in harness.pair.decode.received)
            )
            await harness.add_pair(endless)
            assert (await task).json["choices"][0]["text"] == alphabet(20)

    asyncio.run(scenario())


def test_without_another_node_the_stream_ends_with_an_error_event() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01, queue_timeout_s=0.2) as harness:
            task = await in_flight(harness, max_tokens=400)
            await harness.pair.decode.close()
            harness.pair.running.clear()
            answer = await task
            assert answer.status == 200
            *chunks, last = answer.events  # checks [DONE] too
            assert last["error"]["code"] == "no_capacity"
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            assert text == alphabet(len(text))
            await is_quiet(harness)

    asyncio.run(scenario())


def test_two_deaths_end_the_request_with_an_error() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.add_pair(endless)
            for pair in harness.pairs:
                pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete())
            alive = [pair.prefill for pair in harness.pairs]

            def holders() -> list[StubNode]:
                return [n for n in alive if any(isinstance(m, Prefill) for m in n.received)]

            while alive:
                await eventually(lambda: bool(holders()))
                (holder,) = holders()
                alive.remove(holder)
                await holder.close()  # without a goodbye: it would have left in order
            answer = await task
            assert answer.status == 500
            assert answer.error["type"] == "server_error"

    asyncio.run(scenario())


def test_a_closed_connection_is_noticed_long_before_silence() -> None:
    async def scenario() -> None:
        async with router(endless, node_timeout_s=1000) as harness:
            await harness.pair.decode.close()
            await eventually(lambda: not harness.server.control.ready)

    asyncio.run(scenario())


def test_a_restarted_node_is_used_again() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.complete()
            await harness.pair.close()
            await eventually(lambda: not harness.server.control.ready)
            assert (await harness.complete()).status == 503
            harness.pairs.clear()
            await harness.add_pair(endless)
            assert (await harness.complete()).status == 200

    asyncio.run(scenario())


def test_a_node_that_was_silent_for_too_long_registers_again() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            fleet = harness.server.control.fleet
            fleet.remove(harness.pair.decode.id)  # as if it had been silent
            assert not fleet.ready
            await eventually(lambda: fleet.ready)
            assert (await harness.complete()).status == 200

    asyncio.run(scenario())


def test_a_stalled_node_loses_its_requests_to_another() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            task = await in_flight(harness, max_tokens=100)
            await harness.add_pair(endless)
            harness.pair.decode.set_load(NodeLoad(stalled_s=1000))
            harness.pair.decode.send(Heartbeat(NodeLoad(stalled_s=1000)))
            assert completion_text(await task) == alphabet(100)
            await is_quiet(harness)

    asyncio.run(scenario())


def test_a_draining_node_gets_nothing_new() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            second = await harness.add_pair(endless)
            harness.pair.decode.send(Draining())
            await eventually(lambda: harness.server.control.fleet[harness.pair.decode.id].draining)
            for _ in range(4):
                await harness.complete()
            assert not any(isinstance(m, Reserve) for m in harness.pair.decode.received)
            assert sum(isinstance(m, Reserve) for m in second.decode.received) == 4

    asyncio.run(scenario())


def test_a_failed_attempt_is_tried_again_mid_stream() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            task = await in_flight(harness, max_tokens=60)
            (id,) = harness.pair.running
            harness.pair.running.clear()
            harness.pair.decode.send(AttemptFailed(id, "digest", "a flipped bit", True))
            assert completion_text(await task) == alphabet(60)
            text = (await harness.get("/metrics")).body.decode()
            assert 'baton_router_attempts_ended_total{cause="digest"} 1' in text

    asyncio.run(scenario())


def test_a_contradiction_never_reaches_the_client() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            task = await in_flight(harness, max_tokens=60)
            (id,) = harness.pair.running
            harness.pair.decode.send(Tokens((TokenUpdate(id, 0, (65, 66, 67)),)))
            assert completion_text(await task) == alphabet(60)
            text = (await harness.get("/metrics")).body.decode()
            assert 'baton_router_attempts_ended_total{cause="divergence"} 1' in text

    asyncio.run(scenario())


def test_lost_tokens_are_asked_for() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            task = await in_flight(harness, max_tokens=60)
            run = next(iter(harness.pair.running.values()))
            run.tokens.append(ord("a") + len(run.tokens) % 26)
            run.num_sent = len(run.tokens)  # this one is never sent
            assert completion_text(await task) == alphabet(60)
            assert harness.sent(Resend)

    asyncio.run(scenario())


def test_a_bug_met_by_one_request_costs_the_others_nothing() -> None:
    def script(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
        token, finish = endless(request, index)
        return (1 << 30 if request.tokens[0] == ord("x") else token), finish

    async def scenario() -> None:
        async with router(script) as harness:
            tokenizer = harness.server.control.tokenizer
            assert tokenizer is not None
            tokenizer._plain_table = _Trap(tokenizer._plain_table or [])
            good, bad = await asyncio.gather(
                harness.complete(max_tokens=50), harness.complete(prompt="x", max_tokens=50)
            )
            assert good.json["choices"][0]["text"] == alphabet(50)
            assert (bad.status, bad.error["code"]) == (500, "internal_error")
            await is_quiet(harness)

    asyncio.run(scenario())


class _Trap(list[bytes]):
    """A table that breaks for one token."""

    def __len__(self) -> int:
        return 1 << 31


def test_a_failure_that_no_retry_helps_is_told() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete())
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            (prefill,) = harness.sent(Prefill)
            failure = AttemptFailed(prefill.id, "internal", "the engine broke", False)
            harness.pair.prefill.send(failure)
            answer = await task
            assert (answer.status, answer.error["code"]) == (500, "internal")
            await is_quiet(harness)

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_both_nodes(stream: bool) -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            body = {"prompt": "hi", "max_tokens": 500, "stream": stream, "n": 2}
            url = harness.url + "/v1/completions"

            async def client() -> None:
                async with harness.session.post(url, json=body) as response:
                    await response.read()

            task = asyncio.create_task(client())
            await eventually(lambda: len(harness.pair.running) == 2)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await is_quiet(harness)
            for node in (harness.pair.prefill, harness.pair.decode):
                assert sum(isinstance(m, Abort) for m in node.received) >= 2
            text = (await harness.get("/metrics")).body.decode()
            assert 'finished_reason="abort",model_name="stub"} 2' in text

    asyncio.run(scenario())


def test_a_client_that_leaves_while_it_is_written_to_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The write fails before the loop has noticed the end of the connection."""

    async def write(self: EventStream, data: bytes) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")

    monkeypatch.setattr(EventStream, "write", write)

    async def scenario() -> None:
        async with router(endless) as harness:
            with pytest.raises(aiohttp.ClientError):
                await harness.complete(stream=True, max_tokens=5)
            await is_quiet(harness)
            text = (await harness.get("/metrics")).body.decode()
            assert "baton_router_client_disconnects_total 1.0" in text

    asyncio.run(scenario())
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_client_that_does_not_read_is_given_up() -> None:
    async def scenario() -> None:
        async with router(endless, stream_buffer_bytes=2_000) as harness:
            host, port = harness.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port), limit=1)
            prompts = ["x"] * 100
            body = b'{"stream":true,"max_tokens":500,"prompt":%s}' % (
                str(prompts).replace("'", '"').encode()
            )
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            await eventually(lambda: len(harness.server.control.requests) > 0)
            await is_quiet(harness)
            text = (await harness.get("/metrics")).body.decode()
            assert "baton_router_slow_clients_total 1.0" in text
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    asyncio.run(scenario())


@pytest.mark.parametrize("head", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nA: b\r\n"])
def test_a_connection_without_a_request_is_closed(head: bytes) -> None:
    """Else anybody, with no key at all, could take every file descriptor of the router."""

    async def scenario() -> None:
        async with router(endless, idle_connection_s=0.3, step_s=0.05) as harness:
            host, port = harness.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head)
            long = asyncio.create_task(harness.complete(max_tokens=30))
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()
            assert (await long).status == 200  # a slow answer is no idle connection

    asyncio.run(scenario())


def test_a_full_fleet_makes_requests_wait_and_a_full_queue_turns_them_away() -> None:
    async def scenario() -> None:
        async with router(endless, max_queue=2) as harness:
            harness.pair.refuse_with = "capacity"
            waiting = [asyncio.create_task(harness.complete()) for _ in range(2)]
            await eventually(lambda: harness.server.control.requests.num_waiting == 2)
            refused = await harness.complete()
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
            harness.pair.refuse_with = None
            assert [(await task).status for task in waiting] == [200, 200]

    asyncio.run(scenario())


def test_waiting_for_capacity_ends_with_503() -> None:
    async def scenario() -> None:
        async with router(endless, queue_timeout_s=0.2) as harness:
            harness.pair.refuse_with = "capacity"
            answer = await harness.complete(stream=True)
            assert (answer.status, answer.error["code"]) == (503, "no_capacity")
            assert int(answer.headers["Retry-After"]) >= 1

    asyncio.run(scenario())


def test_the_deadline_ends_a_request() -> None:
    async def scenario() -> None:
        async with router(endless, request_timeout_s=0.2) as harness:
            harness.pair.prefill_hangs = True
            answer = await harness.complete()
            assert (answer.status, answer.error["code"]) == (504, "timeout")
            await is_quiet(harness)

    asyncio.run(scenario())


def test_more_streams_than_allowed_wait_their_turn() -> None:
    async def scenario() -> None:
        async with router(saying("fine"), max_streams=2) as harness:
            answers = await asyncio.gather(*(harness.complete(max_tokens=9) for _ in range(20)))
            assert {answer.json["choices"][0]["text"] for answer in answers} == {"fine"}

    asyncio.run(scenario())


def test_shutdown_ends_streams_with_an_event_and_refuses_new_ones() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.05) as harness:
            task = await in_flight(harness, max_tokens=500)
            closing = asyncio.create_task(harness.server.close())
            await eventually(lambda: harness.server.serving.closing)
            with pytest.raises(aiohttp.ClientConnectorError):
                async with aiohttp.ClientSession() as session:
                    await session.get(harness.url + "/health")
            answer = await task
            assert answer.events[-1]["error"]["code"] == "shutting_down"
            await closing

    asyncio.run(scenario())
