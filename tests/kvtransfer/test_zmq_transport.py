"""The handoff over real sockets, and what hostile or dead peers do to them: nothing lasting."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import zmq

from kvtransfer.lease import LeaseState
from kvtransfer.zmq_transport import ZmqUnitReceiver, ZmqUnitSender
from tests.kvtransfer.rig import DECODE, LAYOUT, PREFILL, Job, Rig, until
from wire.codec import Envelope, encode
from wire.curve import FleetContext
from wire.errors import ConfigError, TransferError
from wire.fleet_key import FleetKey, make_key
from wire.fleet_messages import FetchTokenizer
from wire.handoff_messages import UnitHeader
from wire.layout import KVLayout
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress

ANY_PORT = "tcp://127.0.0.1:*"
NOBODY = "tcp://127.0.0.1:1"
LARGE = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=16, dtype="float32")
assert LARGE.block_bytes == 128 << 10


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


@dataclass
class ZmqRig:
    """A rig whose units travel over TCP."""

    context: zmq.Context[Any]
    layout: KVLayout = LAYOUT
    now: float = 0.0
    rig: Rig = field(init=False)

    def __post_init__(self) -> None:
        self.rig = Rig(layout=self.layout)
        self.receiver = ZmqUnitReceiver(
            DECODE, ANY_PORT, self.rig.receiver, self.rig.received, self.context
        )
        self.sender = ZmqUnitSender(PREFILL, self.context, stall_s=30.0, clock=lambda: self.now)
        self.rig.use(self.sender, self.receiver.address)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()

    async def hand_over(self, num_tokens: int, request: str = "last") -> Job:
        """A handoff that must work, whatever came before it."""
        job = self.rig.reserve(num_tokens, id=AttemptId(request, 1))
        self.rig.hand_over(job)
        await self.rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert self.rig.identical(job)
        self.rig.check_balance()
        return job


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


def dropped(rig: Rig, cause: str) -> Callable[[], int]:
    return lambda: rig.received.units_dropped[cause]


# ---------------------------------------------------------------- with and without the fleet's key


def test_blocks_arrive_through_curve() -> None:
    async def body() -> None:
        context = FleetContext(make_key())
        both = ZmqRig(context, LARGE)
        await both.hand_over(250)
        both.close()
        context.destroy(0)

    run(body())


@pytest.mark.parametrize("key", [make_key(), None], ids=["another key", "no key"])
def test_units_of_strangers_are_not_received(key: FleetKey | None) -> None:
    async def body() -> None:
        ours, theirs = FleetContext(make_key()), FleetContext(key)
        rig = Rig()
        receiver = ZmqUnitReceiver(DECODE, ANY_PORT, rig.receiver, rig.received, ours)
        stranger = ZmqUnitSender(PREFILL, theirs)
        job = rig.reserve(16, id=AttemptId("r", 1))
        stranger.send(receiver.address.url, DECODE, header(), memoryview(b"8 bytes!"), lambda: None)
        await until(lambda: ours.num_refused)
        assert not sum(rig.received.units_dropped.values())
        assert job.lease.state is LeaseState.GRANTED
        stranger.close()
        receiver.close()
        theirs.destroy(0)
        ours.destroy(0)

    run(body())


# ---------------------------------------------------------------- blocks arrive as they are


@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 250])
def test_blocks_arrive_bit_identical(
    context: zmq.Context[Any], layout: KVLayout, num_tokens: int
) -> None:
    async def body() -> None:
        both = ZmqRig(context, layout)
        await both.hand_over(num_tokens)
        both.close()

    run(body())


def test_many_handoffs_through_one_lane(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        jobs = [both.rig.reserve(20 + n, id=AttemptId(f"r{n}", 1)) for n in range(9)]
        for job in jobs:
            both.rig.hand_over(job)
        await both.rig.until_ended()
        assert all(both.rig.identical(job) for job in jobs)
        both.rig.check_balance()
        assert len(both.sender._lanes) == 1
        both.close()

    run(body())


def test_more_units_than_any_queue_holds(context: zmq.Context[Any]) -> None:
    """Nobody listens yet: all of it waits with the sender, and none of it fails."""

    async def body() -> None:
        sender = ZmqUnitSender(PREFILL, context)
        done: list[int] = []
        for _ in range(6000):
            sender.send(NOBODY, DECODE, header(), memoryview(b"12345678"), lambda: done.append(1))
        sender.close()
        assert len(done) == 6000

    run(body())


# ---------------------------------------------------------------- what does not belong


def test_frames_of_every_kind_are_counted_and_leave_the_next_unit_alone(
    context: zmq.Context[Any],
) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        hostile = context.socket(zmq.PUSH)
        hostile.connect(both.receiver.address.url)
        head = encode(Envelope(PREFILL, DECODE, header()))
        other_life = encode(Envelope(PREFILL, NodeId(DECODE.name, 9), header()))
        other_message = encode(Envelope(PREFILL, DECODE, FetchTokenizer()))
        for frames in (
            [b""],
            [head],
            [b"noise", b"payload"],
            [b"noise", b"payload", b"more", b"and more"],
            [other_life, b"payload"],
            [other_message, b"payload"],
            [head, b"payload", b"more"],
            [head, bytes(1 << 20)],
        ):
            hostile.send_multipart(frames)
        drops = both.rig.received.units_dropped
        await until(lambda: drops.total() == 8)
        assert drops == {"malformed": 4, "stale": 2, "expired": 2}
        await both.hand_over(30)
        hostile.close(0)
        both.close()

    run(body())


@pytest.mark.parametrize("length", [0, 1, LAYOUT.block_bytes - 1, LAYOUT.block_bytes + 1, 1 << 20])
def test_a_payload_of_another_length_is_rejected(context: zmq.Context[Any], length: int) -> None:
    """One that is too long is cut by `recv_into`, which must not pass for one that fits."""

    async def body() -> None:
        both = ZmqRig(context)
        rig = both.rig
        job = rig.reserve(4)
        neighbours = [bytes(block) for block in rig.target.blocks[1:]]
        rig.start(job)
        lie = header(capability=job.lease.capability, handle=job.target[0])
        payload = bytes(length)
        both.sender.send(both.receiver.address.url, DECODE, lie, memoryview(payload), lambda: None)
        await rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        assert [bytes(block) for block in rig.target.blocks[1:]] == neighbours
        rig.check_balance()
        await both.hand_over(30)
        both.close()

    run(body())


def test_a_sink_that_fails_does_not_end_the_loop(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        begin, failures = both.rig.receiver.begin, iter([True])

        def fail_once(sender: NodeId, message: UnitHeader) -> Any:
            if next(failures, False):
                raise ValueError("a bug")
            return begin(sender, message)

        monkeypatch.setattr(both.rig.receiver, "begin", fail_once)
        both.sender.send(
            both.receiver.address.url, DECODE, header(), memoryview(b"12345678"), lambda: None
        )
        await until(lambda: caplog.records)
        await both.hand_over(30)
        both.close()

    run(body())
    assert [record.message for record in caplog.records] == ["a message handler failed"]


# ---------------------------------------------------------------- dead peers


@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
def test_a_stalled_lane_is_closed_to_get_the_blocks_back(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture, layout: KVLayout
) -> None:
    """The decode node died: nothing takes the units that libzmq still reads from the pool."""

    async def body() -> None:
        both = ZmqRig(context, layout)
        rig = both.rig
        dead = TransportAddress("zmq", NOBODY)
        job = rig.reserve(layout.block_size * 4 - 1)
        job.grant = replace(job.grant, transports=(dead,))
        rig.hand_over(job)
        rig.sender.abort(job.id, "gone")
        await asyncio.sleep(0.02)
        assert rig.source.touched == 4
        both.now = 29.9
        await asyncio.sleep(0.02)
        assert rig.source.touched == 4
        both.now = 30.0
        await rig.until_ended()
        assert NOBODY not in both.sender._lanes
        rig.check_balance()
        await both.hand_over(30)
        both.close()

    run(body())
    assert "takes no units" in caplog.text


def test_a_lane_that_moves_is_not_stalled(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context, LARGE)
        for number in range(5):
            both.now += 29.0
            await both.hand_over(40, f"r{number}")
        assert len(both.sender._lanes) == 1
        both.close()

    run(body())


def test_a_lane_that_was_idle_has_its_full_time_again(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        await both.hand_over(5, "first")
        url = both.receiver.address.url
        both.receiver.close()
        both.now += 100.0
        await asyncio.sleep(0.02)
        both.sender.send(url, DECODE, header(), memoryview(b"12345678"), lambda: None)
        both.sender.send(NOBODY, DECODE, header(), memoryview(b"12345678"), lambda: None)
        await asyncio.sleep(0.02)
        assert list(both.sender._lanes) == [url, NOBODY]
        both.close()

    run(body())


def test_lanes_to_peers_that_are_long_gone_are_closed(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        await both.hand_over(5, "first")
        both.now += 301.0
        other = ZmqUnitReceiver(DECODE, ANY_PORT, both.rig.receiver, both.rig.received, context)
        both.rig.address = other.address
        await both.hand_over(5, "second")
        assert list(both.sender._lanes) == [other.address.url]
        other.close()
        both.close()

    run(body())


@pytest.mark.parametrize("url", ["smoke://signal", "", "tcp://127.0.0.1:99999"])
def test_an_impossible_address_costs_no_socket(context: zmq.Context[Any], url: str) -> None:
    async def body() -> None:
        sender = ZmqUnitSender(PREFILL, context)
        for _ in range(3):
            with pytest.raises(TransferError, match="cannot send") as caught:
                sender.send(url, DECODE, header(), memoryview(b"12345678"), lambda: None)
            assert caught.value.cause == "transport"
        assert not sender._lanes
        assert all(socket.closed for socket in context._sockets)
        sender.close()

    run(body())


def test_too_many_sockets_are_a_transfer_error() -> None:
    async def body() -> None:
        context = zmq.Context()
        context.max_sockets = 1
        one = context.socket(zmq.PUSH)
        sender = ZmqUnitSender(PREFILL, context)
        with pytest.raises(TransferError):
            sender.send(NOBODY, DECODE, header(), memoryview(b"12345678"), lambda: None)
        sender.close()
        one.close(0)
        context.term()

    run(body())


# ---------------------------------------------------------------- the end


def test_closing_gives_back_what_was_under_way() -> None:
    async def body() -> None:
        context = zmq.Context()
        both = ZmqRig(context, LARGE)
        job = both.rig.reserve(50)
        job.grant = replace(job.grant, transports=(TransportAddress("zmq", NOBODY),))
        both.rig.hand_over(job)
        both.rig.sender.abort(job.id, "drained")
        both.close()
        assert both.rig.source.touched == 0
        await both.rig.until_ended()
        both.rig.check_balance()
        both.close()  # twice is once
        context.term()

    run(body())
    gc.collect()


def test_a_callback_that_fails_stops_no_other(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        failures: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, details: failures.append(details))
        url = both.receiver.address.url

        def fail() -> None:
            raise ValueError("a bug")

        both.sender.send(url, DECODE, header(), memoryview(b"12345678"), fail)
        await both.hand_over(30)
        assert len(failures) == 1
        both.close()

    run(body())


def test_a_port_in_use_is_one_clear_line(context: zmq.Context[Any]) -> None:
    async def body() -> None:
        both = ZmqRig(context)
        with pytest.raises(ConfigError, match=r"cannot listen on .*in use"):
            ZmqUnitReceiver(
                DECODE, both.receiver.address.url, both.rig.receiver, both.rig.received, context
            )
        both.close()

    run(body())
