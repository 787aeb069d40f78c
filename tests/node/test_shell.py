"""A node's life from its first socket to its last word, with a role that a test drives."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from aiohttp import ClientSession

from engine.plan import LayerProgress, OnLayers, RequestProgress, StepResult
from kvtransfer.transport import TransferStats
from node.config import NodeConfig
from node.router_link import RouterLink
from node.shell import NodeShell
from node.stats import NodeStats
from telemetry.metrics import HANDOFFS_OPEN, LEASES
from tests.node.pair import build
from wire.codec import Envelope
from wire.errors import ConfigError
from wire.fleet_messages import (
    CacheEvents,
    Draining,
    FetchTokenizer,
    Gone,
    Goodbye,
    Heartbeat,
    Register,
    TokenizerFiles,
    Unwelcome,
    Welcome,
)
from wire.messages import Message
from wire.request_messages import Abort, TransferRecord
from wire.sockets import Hub
from wire.types import AttemptId, NodeId, Role, TransportAddress

TOKENIZER = TokenizerFiles(b"{}", b"{}")


class ScriptedRole:
    """See node.role.Role."""

    transports: tuple[TransportAddress, ...] = ()

    def __init__(self, name: Role = Role.DECODE) -> None:
        self.name = name
        self.stats = TransferStats()
        states = LEASES if name is Role.DECODE else HANDOFFS_OPEN
        self.open_transfers = {states: {"granted": 2, "receiving": 1}}
        self.num_attempts = 0
        self.calls: list[str] = []
        self.messages: list[Message] = []
        self.num_ticks = 0
        self.bug: Exception | None = None

    def knows(self, id: AttemptId) -> bool:
        return False

    def handle(self, link: RouterLink, message: Message) -> None:
        self.messages.append(message)

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        self.messages.append(message)

    def on_step(self, result: StepResult) -> None:
        self.calls.append("step")

    def on_layers(self, progress: LayerProgress) -> None:
        self.calls.append("layers")

    def fail(self, request_ids: Collection[str], cause: str, message: str) -> None:
        self.calls.append(f"fail {' '.join(request_ids)}")

    def fail_all(self, cause: str, message: str) -> None:
        self.calls.append(f"fail all: {cause}")
        self.num_attempts = 0

    def router_lost(self, link: RouterLink) -> None:
        self.calls.append("router lost")

    def drain(self) -> None:
        self.calls.append("drain")

    def tick(self) -> None:
        self.num_ticks += 1
        if self.bug is not None:
            raise self.bug

    def close(self) -> None:
        self.calls.append("close")


class Router:
    """Welcomes every node, or refuses it."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.me = NodeId("router", 1)
        self.heard: list[Message] = []
        self.node: NodeId | None = None
        self.answer: Message = Welcome(0.05)
        self.hub = Hub(self.me, "tcp://127.0.0.1:*", self._receive, context)

    def _receive(self, envelope: Envelope) -> None:
        self.heard.append(envelope.message)
        self.node = envelope.sender
        if isinstance(envelope.message, Register):
            self.tell(self.answer)

    def tell(self, message: Message) -> None:
        assert self.node is not None
        self.hub.send(self.node, message)

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.heard]

    def count(self, kind: type[Message]) -> int:
        return self.kinds().count(kind.__name__)


class World:
    """A router, and a node that runs."""

    def __init__(self, router: Router, **settings: Any) -> None:
        self.router = router
        self.role = ScriptedRole()
        self.other: ScriptedRole | None = ScriptedRole(Role.PREFILL)
        self.ready: list[str] = []
        config = NodeConfig(
            Path(),
            "decode-0",
            routers=(router.hub.url,),
            drain_timeout_s=settings.pop("drain_timeout_s", 60.0),
            **settings,
        )
        self.shell = NodeShell(
            config,
            build(config, num_blocks=8, max_model_len=32),
            TOKENIZER,
            Role.DECODE,
            {Role.DECODE: lambda shell: self.role, Role.PREFILL: self._other_role},
            NodeId("decode-0", 3),
            self.ready.append,
        )
        self.running = asyncio.create_task(self.shell.run())

    def _other_role(self, shell: NodeShell) -> ScriptedRole:
        if self.other is None:
            raise ConfigError("no such role")
        return self.other

    async def until_ready(self) -> None:
        await self.until(lambda: self.ready)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                if self.running.done():
                    await self.running
                await asyncio.sleep(0.002)

    async def end(self) -> int:
        async with asyncio.timeout(20):
            return await self.running

    async def get(self, path: str) -> tuple[int, str]:
        async with ClientSession() as session, session.get(self.ready[0] + path) as response:
            return response.status, await response.text()


@asynccontextmanager
async def node(answer: Message | None = None, **settings: Any) -> AsyncIterator[World]:
    context: zmq.Context[Any] = zmq.Context()
    router = Router(context)
    if answer is not None:
        router.answer = answer
    w = World(router, **settings)
    try:
        yield w
    finally:
        if not w.running.done():
            w.shell.stop()
            w.shell.stop()
        await asyncio.gather(w.running, return_exceptions=True)
        router.hub.close()
        context.destroy(0)
    assert w.shell.context.closed
    assert not [t for t in threading.enumerate() if t.name == "engine"]


def run(scenario: Callable[[World], Any], **settings: Any) -> None:
    async def body() -> None:
        async with node(**settings) as w:
            await scenario(w)

    asyncio.run(body())


def test_an_idle_node_comes_and_goes() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        await w.until(lambda: w.router.count(Heartbeat) > 1)
        w.shell.stop()
        assert await w.end() == 0
        assert w.role.calls == ["drain", "fail all: drained", "close"]
        await asyncio.sleep(0.05)
        assert w.router.kinds()[0] == "Register"
        assert w.router.kinds()[-2:] == ["Draining", "Goodbye"]

    run(scenario, drain_timeout_s=1e6)


def test_what_it_registers() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        register = w.router.heard[0]
        assert isinstance(register, Register)
        assert register.num_blocks == 8
        assert register.http_url == w.ready[0]
        assert register.peer_url == w.shell.peer_url
        assert register.model.max_model_len == 32

    run(scenario)


def test_addresses_that_others_can_use() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        register = w.router.heard[0]
        assert isinstance(register, Register)
        assert register.http_url.startswith("http://box:")
        assert register.peer_url.startswith("tcp://box:")
        assert (await w.get("/health"))[0] == 200

    run(scenario, host="0.0.0.0", insecure=True, advertise_host="box")


def ipv6_works() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
def test_ipv6() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        assert w.ready[0].startswith("http://[::1]:")
        assert w.shell.peer_url.startswith("tcp://[::1]:")
        assert (await w.get("/health"))[0] == 200

    run(scenario, host="::1")


def test_what_routers_ask() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.router.tell(FetchTokenizer())
        await w.until(lambda: TOKENIZER in w.router.heard)
        assert w.router.count(CacheEvents) == 1, "the snapshot for its welcome"
        abort = Abort(AttemptId("r", 1))
        w.router.tell(abort)
        await w.until(lambda: w.role.messages == [abort])

    run(scenario)


def test_pages() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        assert await w.get("/health") == (200, '{"status": "ok"}')
        status, body = await w.get("/ready")
        assert (status, json.loads(body)) == (200, {"ready": True})
        w.router.answer = FetchTokenizer()  # it knows this node no more
        w.router.tell(Gone(w.router.me))
        await w.until(lambda: "router lost" in w.role.calls)
        assert (await w.get("/ready"))[0] == 503
        assert (await w.get("/nothing"))[0] == 404

    run(scenario)


def test_metrics() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        stats = w.shell.stats
        progress = RequestProgress("r/1", 5, 0, (4,), None, 0)
        stats.count_step(StepResult(1, (progress,), 5, 2, seconds=0.25))
        stats.count_lookup(10, 4)
        w.role.stats.handoffs["committed"] += 3
        w.role.stats.units_dropped["stale"] += 1
        w.role.stats.messages_unsent += 2
        w.role.stats.count_transfer(TransferRecord("shm", 2, 5000, 0.5, 1000, 0.03, 0.02))
        status, text = await w.get("/metrics")
        assert status == 200
        lines = set(text.splitlines())
        assert {
            'baton_blocks{state="free"} 8.0',
            "baton_blocks_capacity 8.0",
            "baton_steps_total 1.0",
            "baton_step_tokens_total 5.0",
            "baton_sampled_tokens_total 1.0",
            'vllm:num_preemptions_total{model_name="model"} 2.0',
            'vllm:prefix_cache_queries_total{model_name="model"} 10.0',
            'vllm:prefix_cache_hits_total{model_name="model"} 4.0',
            'vllm:kv_cache_usage_perc{model_name="model"} 0.0',
            'baton_handoffs_total{outcome="committed"} 3.0',
            "baton_transfer_messages_unsent_total 2.0",
            "baton_step_seconds_sum 0.25",
            'vllm:iteration_tokens_total_bucket{le="8.0",model_name="model"} 1.0',
            'vllm:iteration_tokens_total_bucket{le="1.0",model_name="model"} 0.0',
            'vllm:iteration_tokens_total_count{model_name="model"} 1.0',
            'baton_transfer_bytes_sum{transport="shm"} 5000.0',
            'baton_transfer_rate_bytes_per_second_sum{transport="shm"} 10000.0',
            'baton_transfer_seconds_count{transport="shm"} 1.0',
            'baton_transfer_tail_bytes_sum{transport="shm"} 1000.0',
            'baton_transfer_tail_seconds_sum{transport="shm"} 0.03',
            'baton_transfer_commit_wait_seconds_sum{transport="shm"} 0.02',
            'baton_leases{state="granted"} 2.0',
            'baton_leases{state="receiving"} 1.0',
            'baton_transfer_units_dropped_total{cause="stale"} 1.0',
        } <= lines

    run(scenario)


def test_malformed_messages_are_counted_and_end_nothing() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        with w.shell.context.socket(zmq.DEALER) as stranger:
            stranger.linger = 0
            stranger.connect(w.shell.peer_url)
            stranger.send(b"no message of ours")
            await w.until(lambda: w.shell._num_malformed() == 1)
        _, text = await w.get("/metrics")
        assert "baton_malformed_messages_total 1.0" in text.splitlines()
        assert (await w.get("/ready"))[0] == 200

    run(scenario)


def test_unfinished_chunks_are_counted() -> None:
    stats = NodeStats()
    chunk = RequestProgress("r/1", 5, 0, (), None, 0)
    stats.count_step(StepResult(1, (chunk, replace(chunk, new_tokens=(1,))), 9, 0))
    assert (stats.unfinished_chunks, stats.output_tokens, stats.step_tokens) == (1, 1, 9)


# ---------------------------------------------------------------- ends


def test_it_waits_for_what_runs_but_takes_a_second_word() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.role.num_attempts = 2
        w.shell.stop()
        await w.until(lambda: w.router.count(Draining))
        await w.until(lambda: w.role.num_ticks > 3)
        assert not w.running.done()
        assert w.role.calls == ["drain"]
        w.shell.stop()
        assert await w.end() == 0
        assert w.role.calls[:2] == ["drain", "fail all: drained"]

    run(scenario)


def test_it_does_not_wait_for_ever() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.role.num_attempts = 1
        w.shell.stop()
        assert await w.end() == 0
        assert "fail all: drained" in w.role.calls

    run(scenario, drain_timeout_s=0.05)


def test_a_node_that_must_end_does_not_say_that_it_was_told_to() -> None:
    """A request that kills engines would be welcome on the next node, and the one after it."""

    async def scenario(w: World) -> None:
        await w.until_ready()
        w.role.num_attempts = 1
        w.shell._die("the engine fails at every step")
        assert await w.end() == 1
        assert w.role.calls == ["drain", "fail all: internal", "close"]

    run(scenario)


def test_a_router_that_comes_during_the_drain_hears_of_it() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.role.num_attempts = 1
        w.shell.stop()
        await w.until(lambda: w.router.count(Draining))
        w.router.tell(Gone(w.router.me))
        await w.until(lambda: w.router.count(Draining) > 1)

    run(scenario)


def test_unwelcome_is_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(w: World) -> None:
        w.role.num_attempts = 1  # nobody waits for anything then
        assert await w.end() == 1
        assert not w.ready
        errors = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
        assert errors == [f"router {w.router.hub.url} refused this node: your model is another"]

    run(scenario, answer=Unwelcome("your model is another"))


def test_a_quiet_end_although_the_router_went_first(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.router.hub.close()
        await w.until(lambda: "router lost" in w.role.calls)
        w.shell.stop()
        assert await w.end() == 0

    run(scenario)
    assert not [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_taken_port_is_named_and_nothing_is_left() -> None:
    async def scenario(w: World) -> None:
        with pytest.raises(ConfigError, match=r"cannot listen on .*in use"):
            await w.running
        assert w.role.calls == ["close"]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        run(scenario, port=taken.getsockname()[1])


def test_a_bug_in_a_tick_does_not_stop_time(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(w: World) -> None:
        w.role.bug = ArithmeticError("one request is odd")
        await w.until_ready()
        seen = w.role.num_ticks
        await w.until(lambda: w.role.num_ticks > seen + 2)
        w.role.bug = None

    run(scenario)
    assert "one request is odd" in caplog.text


def test_a_failed_step_is_told_to_the_role() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.shell._step_failed(ArithmeticError("x"), ("r/1", "s/2"))
        assert w.role.calls == ["fail r/1 s/2"]

    run(scenario)


def test_an_engine_that_always_fails_ends_the_node() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()

        def step(on_layers: OnLayers | None = None) -> StepResult | None:
            raise ArithmeticError("broken")

        engine = w.shell.engine
        engine.step = step  # type: ignore[method-assign]
        engine.has_work = lambda: True  # type: ignore[method-assign]
        w.shell.wake()
        assert await w.end() == 1

    run(scenario)


def test_goodbye_is_said_when_everything_was_told() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.shell.stop()
        await w.end()
        await asyncio.sleep(0.05)
        assert w.router.count(Goodbye) == 1

    run(scenario)
