"""The handoff over UCX between two processes, and what dead, stopped and hostile peers do to it."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvtransfer.lease import LeaseState
from kvtransfer.transport import TransferStats
from kvtransfer.ucx_lane import MAGIC, header_tag, payload_tag
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import (
    ENVIRONMENT,
    DrivenWorker,
    array,
    new_context,
    settings,
    why_unavailable,
)
from tests.kvtransfer.pool import filled
from tests.kvtransfer.rig import DECODE as RIG_DECODE
from tests.kvtransfer.rig import LAYOUT, Rig, until
from tests.kvtransfer.ucx_peer import DECODE, PREFILL, DecodeEnd, Post, PrefillEnd
from wire.codec import Envelope, encode
from wire.errors import ConfigError, TransferError
from wire.messages import FetchTokenizer, UnitHeader
from wire.types import AttemptId, BlockHandle, NodeId

os.environ.update(ENVIRONMENT)  # UCX reads it when it is loaded
if WHY_NOT := why_unavailable():
    pytest.skip(WHY_NOT, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "ucx://127.0.0.1:1"


def nothing() -> None:
    """What is to be done when a send is over."""


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


@dataclass
class Peer:
    """The other process."""

    process: subprocess.Popen[bytes]
    post: Post
    url: str

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def peer(
    role: str, tmp_path: Path, kib: int, *flags: str, port: int = 0
) -> AsyncIterator[Peer]:
    """Start the other end; it ends by itself, or by force, and says nothing unless it is killed."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    path = f"ipc://{tmp_path}/{secrets.token_hex(4)}"
    socket.bind(path)
    post = Post(socket)
    ready: list[str] = []
    post.handlers[b"ready"] = lambda url: ready.append(url.decode())
    command = [sys.executable, "-m", "tests.kvtransfer.ucx_peer", role, path, str(kib), str(port)]
    process = subprocess.Popen(  # noqa: ASYNC220
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        await until(lambda: ready or process.poll() is not None)
        assert ready, "it did not start"
        yield Peer(process, post, ready[0])
        if process.poll() is None:
            post.send(b"end")
            await asyncio.to_thread(process.wait, 20)
    finally:
        process.kill()
        said = process.communicate()[0].decode()
        post.close()
        context.destroy(0)
    assert not any(word in said for word in ("UCX", "Traceback", "Error")), said
    assert process.returncode in (0, -signal.SIGKILL)


async def ask(post: Post, kind: bytes, *frames: bytes, answer: bytes) -> tuple[bytes, ...]:
    heard: list[tuple[bytes, ...]] = []
    post.handlers[answer] = lambda *frames: heard.append(frames)
    post.send(kind, *frames)
    await until(lambda: heard)
    return heard[0]


async def check_delivered(end: PrefillEnd, post: Post, names: list[str], num_tokens: int) -> None:
    """What the other process holds is what was handed over, and nothing touches a block."""
    size = end.pool.layout.block_size
    for name in names:
        for index, target in enumerate(end.grants[name].handles):
            frames = await ask(post, b"look", str(target.block_id).encode(), answer=b"seen")
            end_of = min(size, num_tokens - index * size)
            there = filled(memoryview(frames[0]), end_of, end.pool.layout)
            assert there == end.pool.content(end.source[name][index], end_of)
            assert frames[1] == b"0"


# ---------------------------------------------------------------- blocks arrive as they are


@pytest.mark.parametrize("kib", [1, 47, 49, 1024, 4096])
def test_blocks_arrive_bit_identical(tmp_path: Path, kib: int) -> None:
    """Full ones and a partial one, on both sides of every threshold of UCX."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            names = [f"r{i}" for i in range(2)]
            for name in names:
                other.post.send(b"reserve", name.encode(), b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, other.post, names, 14)
            end.close()

    run(body())


def test_two_hundred_units_back_to_back(tmp_path: Path) -> None:
    """To a process that runs torch and ZMQ as well."""

    async def body() -> None:
        async with peer("decode", tmp_path, 64, "torch") as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"long", b"800")
            await until(lambda: end.ended and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 1}
            assert end.stats.bytes_sent == 200 * (64 << 10)
            await check_delivered(end, other.post, ["long"], 800)
            end.close()

    run(body())


# ---------------------------------------------------------------- a decode node that goes


def granted(end: PrefillEnd, name: str) -> Callable[[], object]:
    return lambda: name in end.source


@pytest.mark.parametrize("kib", [4, 1024])
def test_a_killed_decode_node_ends_every_send(
    tmp_path: Path, kib: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stopped first, so that the sends are under way when it dies."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            other.post.send(b"reserve", b"before", b"14")
            await until(lambda: end.ended)
            other.post.send(b"reserve", b"during", b"100")
            await until(granted(end, "during"))
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            other.signal(signal.SIGKILL)
            await until(lambda: end.units._lanes[other.url].lost and not end.pool.touched)
            end.close()

    run(body())
    assert kib == 4 or "is gone" in caplog.text  # small units are in the kernel's hands by then


def test_what_was_lost_a_moment_ago_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    async def body() -> None:
        nonlocal now
        sender = UcxUnitSender(PREFILL, clock=lambda: now)
        done: list[int] = []

        def send() -> None:
            sender.send(NOBODY, DECODE, header(), memoryview(b"12345678"), lambda: done.append(1))

        send()
        send()
        await until(lambda: len(done) == 2)
        with pytest.raises(TransferError, match="lost a moment ago") as caught:
            send()
        assert caught.value.cause == "transport"
        now = 1.0
        send()
        await until(lambda: len(done) == 3)
        sender.close()
        assert len(done) == 3

    run(body())
    assert "is gone; dropped 2 units" in caplog.text


def test_a_decode_node_that_was_killed_between_handoffs_costs_one_lane(tmp_path: Path) -> None:
    """Its successor on the same port is connected to at once."""

    async def body() -> None:
        async with peer("decode", tmp_path, 64) as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: end.units._lanes[other.url].lost)
        port = int(other.url.rpartition(":")[2])
        async with peer("decode", tmp_path, 64, port=port) as successor:
            assert successor.url == other.url
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            successor.post.send(b"reserve", b"second", b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, successor.post, ["second"], 14)
            end.close()

    run(body())


def test_a_stopped_decode_node_keeps_the_sends_until_the_lane_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with peer("decode", tmp_path, 1024) as other:
            end = PrefillEnd(other.post, 1024, stall_s=0.5)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.post.send(b"reserve", b"second", b"100")
            await until(granted(end, "second"))
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            assert end.pool.touched
            await until(lambda: not end.pool.touched)
            other.signal(signal.SIGCONT)
            await asyncio.sleep(1.1)  # no handoff is tried on a lane lost a moment ago
            other.post.send(b"reserve", b"third", b"14")
            await until(lambda: "third" in end.ended and not end.pool.touched)
            assert end.stats.handoffs["committed"] == 2
            await check_delivered(end, other.post, ["third"], 14)
            end.close()

    run(body())
    assert "takes no units" in caplog.text


def test_closing_with_sends_in_flight_gives_every_block_back_once(tmp_path: Path) -> None:
    """`Pool.end_io` fails on a second time."""

    async def body() -> None:
        async with peer("decode", tmp_path, 1024) as other:
            for number in range(3):
                end = PrefillEnd(other.post, 1024)
                other.post.send(b"reserve", f"r{number}".encode(), b"100")
                await until(lambda end=end: end.source)  # type: ignore[misc]
                await asyncio.sleep(0.005 * number)
                end.close()
                end.close()
                assert not end.pool.touched

    run(body())


# ---------------------------------------------------------------- a prefill node that goes


@pytest.mark.parametrize(("kib", "after_s"), [(4, 0.003), (1024, 0.0), (1024, 0.01), (4096, None)])
def test_a_killed_prefill_node_touches_no_block_any_more(
    tmp_path: Path, kib: int, after_s: float | None
) -> None:
    """Killed before or between its units, or (None) within one; its successor finds order."""

    async def body() -> None:
        async with peer("prefill", tmp_path, kib) as other:
            end = DecodeEnd(other.post, kib)
            end.reserve("first", 14)
            await until(lambda: end.leases)
            end.reserve("second", 100)
            if after_s is None:
                await until(lambda: end.pool.touched)
                other.signal(signal.SIGSTOP)
                await asyncio.sleep(0.05)
                assert end.pool.touched
            else:
                await asyncio.sleep(after_s)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: not end.units._lanes and not end.pool.touched)
            end.receiver.end_sender(PREFILL)
        async with peer("prefill", tmp_path, kib) as successor:
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            end.reserve("third", 14)
            await until(lambda: len(end.leases) == 3 and not end.pool.touched)
            assert end.leases[-1].state is LeaseState.COMMITTED
            end.close()

    run(body())


def test_a_stopped_prefill_node_loses_its_lane(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it began cannot be revoked; closing the endpoint ends it, and nothing comes later."""

    async def body() -> None:
        async with peer("prefill", tmp_path, 4096) as other:
            end = DecodeEnd(other.post, 4096, stall_s=0.5)
            end.reserve("first", 100)
            await until(lambda: end.pool.touched)
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            assert end.pool.touched
            end.receiver.abort(AttemptId("first", 1))
            assert end.pool.quarantined
            await until(lambda: not end.pool.touched)
            assert not end.pool.quarantined
            for block in end.pool.blocks:
                block[:] = bytes(len(block))
            other.signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert not any(any(block) for block in end.pool.blocks)
            end.close()
            other.signal(signal.SIGKILL)

    run(body())
    assert "stopped within" in caplog.text


def header(**other: Any) -> UnitHeader:
    values: dict[str, Any] = {
        "lease": 1,
        "capability": b"c" * 16,
        "unit": 0,
        "handle": BlockHandle(22, 0, 1),
        "token_start": 0,
        "token_end": 4,
        "num_bytes": 8,
    }
    return UnitHeader(**values | other)


# ---------------------------------------------------------------- what does not belong


@dataclass
class UcxRig:
    """A rig whose units travel over UCX, and a peer that may send what it likes."""

    def __post_init__(self) -> None:
        self.rig = Rig(layout=LAYOUT)
        self.receiver = UcxUnitReceiver(RIG_DECODE, self.rig.receiver, self.rig.received)
        self.sender = UcxUnitSender(PREFILL)
        self.rig.use(self.sender, self.receiver.address)

    async def hand_over(self, num_tokens: int, request: str = "last") -> None:
        """A handoff that must work, whatever came before it."""
        job = self.rig.reserve(num_tokens, id=AttemptId(request, 1))
        self.rig.hand_over(job)
        await self.rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert self.rig.identical(job)
        self.rig.check_balance()

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


class Hostile:
    """A connection to a decode node that sends what it likes."""

    def __init__(self, url: str) -> None:
        self.driver = DrivenWorker(new_context(settings()), lambda: False, lambda: None)
        port = int(url.rpartition(":")[2])
        self.endpoint = self.driver.worker.create_endpoint_from_hostname("127.0.0.1", port, True)
        self.sent: list[tuple[Any, Any]] = []
        self.key = 0

    async def welcomed(self) -> None:
        await until(lambda: self.driver.probe(0))
        welcome = bytearray(16)
        self.driver.receive(array(welcome), 0)
        assert welcome.startswith(MAGIC)
        self.key = int.from_bytes(welcome[8:], "little")

    def send(self, tag: int, data: bytes) -> None:
        buffer = array(data)
        self.sent.append((buffer, self.driver.send(self.endpoint, buffer, tag)))
        self.driver.wake()

    async def close(self) -> None:
        """Whatever it sent was taken from it: nothing stays with UCX."""
        await until(lambda: all(request.completed for _, request in self.sent))
        self.endpoint.close_blocking()
        self.driver.close()


def test_messages_of_every_kind_are_counted_and_leave_the_next_unit_alone() -> None:
    async def body() -> None:
        both = UcxRig()
        hostile = Hostile(both.receiver.address.url)
        await hostile.welcomed()
        head = encode(Envelope(PREFILL, RIG_DECODE, header()))
        other_life = encode(Envelope(PREFILL, NodeId(RIG_DECODE.name, 9), header()))
        other_message = encode(Envelope(PREFILL, RIG_DECODE, FetchTokenizer()))
        first, second = header_tag(hostile.key), payload_tag(hostile.key)
        for tag, data in (
            (second, b"a payload alone"),  # malformed
            (first, b"noise"),  # malformed
            (second, b"its payload"),
            (first, head),
            (first, bytes(1 << 20)),  # malformed twice: no payload before it, and too large
            (second, b"its payload"),
            (first, other_life),  # stale
            (second, bytes(1 << 20)),
            (first, other_message),  # stale
            (second, b"its payload"),
            (first, head),  # expired
            (second, bytes(4 << 20)),
            (12345, b"no lane's"),
            (1 << 63, bytes(1 << 20)),
        ):
            hostile.send(tag, data)
        await hostile.close()
        assert both.rig.received.units_dropped == {"malformed": 4, "stale": 2, "expired": 1}
        await both.hand_over(30)
        both.close()

    run(body())


@pytest.mark.parametrize("length", [1, LAYOUT.block_bytes - 1, LAYOUT.block_bytes + 1, 1 << 20])
def test_a_payload_of_another_length_is_rejected(length: int) -> None:
    async def body() -> None:
        both = UcxRig()
        rig = both.rig
        job = rig.reserve(4)
        before = [bytes(block) for block in rig.target.blocks]
        rig.start(job)
        lie = header(capability=job.lease.capability, handle=job.target[0])
        url = both.receiver.address.url
        both.sender.send(url, RIG_DECODE, lie, memoryview(bytes(length)), nothing)
        await rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        assert [bytes(block) for block in rig.target.blocks] == before
        rig.check_balance()
        await both.hand_over(30)
        both.close()

    run(body())


def test_a_refused_unit_goes_nowhere() -> None:
    """Its lease has ended: of a large unit not even the bytes travel, and the sender is let go."""

    async def body() -> None:
        both = UcxRig()
        job = both.rig.reserve(4)
        both.rig.receiver.abort(job.id)
        before = [bytes(block) for block in both.rig.target.blocks]
        done: list[int] = []
        for length in (LAYOUT.block_bytes, 4 << 20):
            unit = header(capability=job.lease.capability, handle=job.target[0])
            payload = memoryview(bytes(length))
            both.sender.send(
                both.receiver.address.url, RIG_DECODE, unit, payload, lambda: done.append(1)
            )
        await until(lambda: len(done) == 2 and both.rig.received.units_dropped["expired"] == 2)
        assert [bytes(block) for block in both.rig.target.blocks] == before
        both.close()

    run(body())


def test_handlers_that_fail_stop_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        both = UcxRig()
        begin, failures = both.rig.receiver.begin, iter([True])

        def fail_once(sender: NodeId, message: UnitHeader) -> Any:
            if next(failures, False):
                raise ValueError("a bug")
            return begin(sender, message)

        def fail() -> None:
            raise ValueError("another bug")

        monkeypatch.setattr(both.rig.receiver, "begin", fail_once)
        both.sender.send(
            both.receiver.address.url, RIG_DECODE, header(), memoryview(b"12345678"), fail
        )
        await until(lambda: len(caplog.records) == 2)
        await both.hand_over(30)
        both.close()

    run(body())
    messages = {record.message for record in caplog.records}
    assert messages == {"a message handler failed", "the end of a send was not handled"}


@pytest.mark.parametrize(
    "url", ["smoke://signal", "", "ucx://localhost:7000", "ucx://127.0.0.1:99999", "ucx://1.2.3.4"]
)
def test_an_impossible_address_is_a_transfer_error(url: str) -> None:
    async def body() -> None:
        sender = UcxUnitSender(PREFILL)
        with pytest.raises(TransferError, match="cannot send") as caught:
            sender.send(url, DECODE, header(), memoryview(b"12345678"), nothing)
        assert caught.value.cause == "transport"
        assert not sender._lanes
        sender.close()

    run(body())


# ---------------------------------------------------------------- beginnings and ends


def test_a_peer_is_closed_on_demand() -> None:
    async def body() -> None:
        both = UcxRig()
        url = both.receiver.address.url
        assert both.sender.reaches(url, RIG_DECODE)
        done: list[int] = []
        both.sender.send(
            url, RIG_DECODE, header(), memoryview(bytes(1 << 20)), lambda: done.append(1)
        )
        both.sender.close_peer(url)
        await until(lambda: done)
        await both.hand_over(30)
        both.close()
        both.close()  # twice is once

    run(body())


def test_lanes_to_peers_that_are_long_gone_are_closed() -> None:
    async def body() -> None:
        now = 0.0
        both = UcxRig()
        both.sender = UcxUnitSender(PREFILL, clock=lambda: now)
        both.rig.use(both.sender, both.receiver.address)
        await both.hand_over(5, "first")
        now = 301.0
        other = UcxUnitReceiver(RIG_DECODE, both.rig.receiver, both.rig.received)
        both.rig.address = other.address
        await both.hand_over(5, "second")
        assert list(both.sender._lanes) == [other.address.url]
        other.close()
        both.close()

    run(body())


def test_a_port_in_use_is_one_clear_line() -> None:
    async def body() -> None:
        both = UcxRig()
        port = int(both.receiver.address.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match="cannot listen on port"):
            UcxUnitReceiver(RIG_DECODE, both.rig.receiver, TransferStats(), port=port)
        both.close()

    run(body())


def test_no_setting_lets_a_peer_write_here() -> None:
    with pytest.raises(ConfigError, match="put_zcopy"):
        settings(rendezvous="put_zcopy")
    assert settings(net_devices="eth0")["NET_DEVICES"] == "eth0"


def test_without_ucxx_it_is_one_clear_line() -> None:
    code = """
import sys
sys.modules["ucxx"] = None
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import why_unavailable
print(UcxUnitReceiver.__name__, UcxUnitSender.__name__, why_unavailable())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "UcxUnitReceiver UcxUnitSender the ucx transport is not available: "
    )
    assert done.stdout.count("\n") == 1
