"""Units through shared memory: one copy under a lease, and nothing a peer does gets further."""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import gc
import mmap
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from kvtransfer.cuda_ipc_transport import CudaIpcUnitSender, cuda_ipc_receiver
from kvtransfer.device_pool import HostDeviceMapping
from kvtransfer.digest import UnitSealer
from kvtransfer.lease import LeaseState
from kvtransfer.shared_memory import MappedMemory, SharedMemory, host_id
from kvtransfer.shm_connection import HELLO, MAGIC
from kvtransfer.shm_stream import ANSWER, INLINE
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.unit_header import pack, unpack
from tests.kvtransfer.device_memory import DeviceMemory
from tests.kvtransfer.rig import (
    DECODE,
    LAYOUT,
    PREFILL,
    Job,
    Rig,
    header,
    quiet,
    run,
    until,
)
from wire.codec import Envelope, encode
from wire.errors import TransferError
from wire.handoff_messages import RenewLeases, UnitHeader
from wire.layout import KVLayout
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress

LARGE = KVLayout(num_layers=4, num_kv_heads=4, head_dim=64, block_size=16, dtype="float32")
NUM_BLOCKS = 64  # of the rig's pools
FULL = LAYOUT.block_bytes


def num_descriptors() -> int:
    gc.collect()  # pools of other tests have theirs
    return len(os.listdir("/proc/self/fd"))


@dataclass
class ShmRig:
    """A rig whose source pool is shared and whose units travel by place."""

    layout: KVLayout = LAYOUT
    now: float = 0.0
    rig: Rig = field(init=False)

    def __post_init__(self) -> None:
        self.rig = Rig(layout=self.layout)
        size = self.layout.block_bytes
        self.pool = SharedMemory(NUM_BLOCKS * size)
        whole = memoryview(self.pool.buffer)
        blocks: list[Any] = [whole[i * size : (i + 1) * size] for i in range(NUM_BLOCKS)]
        self.rig.source.blocks = blocks
        self.receiver = ShmUnitReceiver(DECODE, self.rig.receiver, self.rig.received)
        self.sender = ShmUnitSender(PREFILL, self.pool, clock=lambda: self.now)
        self.rig.use(self.sender, self.receiver.address)

    @property
    def url(self) -> str:
        return self.receiver.address.url

    def seal(self) -> None:
        """What is computed is sealed by now."""

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.pool.close()

    async def hand_over(self, num_tokens: int, request: str = "last") -> Job:
        """A handoff that must work, whatever came before it."""
        return await self.rig.hand_over_well(num_tokens, request)


@dataclass
class CudaIpcRig(ShmRig):
    """The same lanes to a device's memory, with host memory in the device's place."""

    def __post_init__(self) -> None:
        self.rig = Rig(layout=self.layout, make_pool=DeviceMemory)
        source = cast(DeviceMemory, self.rig.source)
        self.pool = source.shared  # type: ignore[assignment]
        self.receiver = cuda_ipc_receiver(
            DECODE, self.rig.receiver, self.rig.received, HostDeviceMapping
        )
        sender = CudaIpcUnitSender(PREFILL, source.shared, self._lost, clock=lambda: self.now)
        self.rig.use(sender, self.receiver.address)
        self.sender = sender._lanes

    def seal(self) -> None:
        cast(DeviceMemory, self.rig.source).go_on()

    def _lost(self, address: TransportAddress, error: TransferError) -> None:
        self.rig.sender.lost(address, error)


both_ways = pytest.mark.parametrize("make", [ShmRig, CudaIpcRig], ids=["shm", "cuda-ipc"])


# ---------------------------------------------------------------- the memory


def test_nobody_else_can_write_the_pool_or_change_its_size() -> None:
    pool = SharedMemory(1 << 16)
    pool.buffer[:5] = b"block"
    for path_flags in (os.O_RDONLY, os.O_RDWR):
        again = os.open(f"/proc/self/fd/{pool.descriptor}", path_flags)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 1 << 16)
        with pytest.raises(OSError, match=r"not permitted|Bad file descriptor"):
            os.pwrite(again, b"x", 0)
        with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
            os.ftruncate(again, 0)
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(again)
    mapped = MappedMemory(pool.descriptor, 1 << 16)
    with mapped.part(0, 5) as part:
        assert bytes(part) == b"block"
        with pytest.raises(TypeError):
            part[0] = 0
        pool.buffer[:5] = b"other"
        assert bytes(part) == b"other"
    mapped.close()
    pool.close()


def test_a_pool_takes_no_memory_until_it_is_written() -> None:
    pool = SharedMemory(1 << 40)
    assert os.fstat(pool.descriptor).st_blocks == 0
    pool.buffer[1 << 30] = 1
    assert os.fstat(pool.descriptor).st_blocks * 512 <= 4 << 20
    pool.close()


def test_where_a_view_lies() -> None:
    pool = SharedMemory(1 << 16)
    whole = memoryview(pool.buffer)
    assert pool.offset_of(whole) == 0
    assert pool.offset_of(whole[4096:5000]) == 4096
    assert pool.offset_of(memoryview(bytearray(100))) is None
    assert pool.offset_of(whole[1 << 16 :]) in (None, 1 << 16)  # of no bytes
    pool.close()


@contextmanager
def ordinary_file(size: int) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        yield file.fileno()


def test_memory_that_could_shrink_under_the_reader_is_refused() -> None:
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    fcntl.fcntl(loose, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    with pytest.raises(ValueError, match="shrink"):
        MappedMemory(loose, 4096)
    os.close(loose)
    with ordinary_file(4096) as plain, pytest.raises((OSError, ValueError)):
        MappedMemory(plain, 4096)
    pool = SharedMemory(4096)
    with pytest.raises(ValueError, match="not a memory of"):
        MappedMemory(pool.descriptor, 8192)
    pool.close()


# ---------------------------------------------------------------- blocks arrive as they are


@pytest.mark.parametrize("secret", [b"c" * 16, b"d" * 32, bytes(20)])
def test_a_header_comes_out_as_it_went_in(secret: bytes) -> None:
    limit = (1 << 31) - 1
    handle = BlockHandle((1 << 64) - 1, limit, (1 << 64) - 2)
    unit = UnitHeader((1 << 64) - 3, secret, limit, handle, limit - 1, limit, limit - 2)
    assert unpack(pack(unit, INLINE)) == (unit, INLINE)


@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("num_tokens", [1, 16, 17, 250])
@both_ways
def test_blocks_arrive_bit_identical(make: type[ShmRig], layout: KVLayout, num_tokens: int) -> None:
    async def body() -> None:
        both = make(layout)
        await both.hand_over(num_tokens)
        both.close()

    run(body())


def test_full_units_go_by_place_and_partial_ones_inline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        both = ShmRig()
        seen: list[tuple[bool, int]] = []
        place = both.receiver.place

        def watch(sender: NodeId, units: list[tuple[UnitHeader, memoryview]]) -> None:
            seen.extend((source.readonly, len(source)) for _, source in units)
            place(sender, units)

        monkeypatch.setattr(both.receiver, "place", watch)
        await both.hand_over(11)
        assert seen == [(True, FULL), (True, FULL), (False, FULL * 3 // 4)]
        both.close()

    run(body())


@both_ways
def test_many_handoffs_through_one_connection(make: type[ShmRig]) -> None:
    async def body() -> None:
        both = make()
        jobs = [both.rig.reserve(20 + n, id=AttemptId(f"r{n}", 1)) for n in range(9)]
        for job in jobs:
            both.rig.hand_over(job)
        await both.rig.until_ended()
        assert all(both.rig.identical(job) for job in jobs)
        both.rig.check_balance()
        assert both.receiver.num_peers == len(both.sender._lanes) == 1
        both.close()

    run(body())


def test_more_units_than_the_socket_holds_end_once_and_in_order() -> None:
    """The receiver is not in the loop's way, and every send ends exactly once."""

    async def body() -> None:
        both = ShmRig()
        ended: list[int] = []
        payload = memoryview(both.pool.buffer)[:FULL]
        for number in range(5000):
            both.sender.send(both.url, DECODE, header(), payload, lambda n=number: ended.append(n))  # type: ignore[misc]
        assert not ended
        await until(lambda: len(ended) == 5000)
        assert ended == list(range(5000))
        assert both.rig.received.units_dropped == {"expired": 5000}
        await both.hand_over(30)
        assert len(ended) == 5000
        both.close()

    run(body())


def test_the_loop_has_its_turn_between_large_copies() -> None:
    async def body() -> None:
        both = ShmRig(LARGE)
        job = both.rig.reserve(64 * 16)
        turns, landed = 0, 0
        both.rig.hand_over(job)
        while len(both.rig.receiver.table):
            turns += 1
            step = both.rig.received.bytes_received - landed
            assert step <= (8 << 20) + LARGE.block_bytes
            landed += step
            await asyncio.sleep(0)
        assert turns > 2
        await both.rig.until_ended()
        assert both.rig.identical(job)
        both.close()

    run(body())


# ---------------------------------------------------------------- what has no right to a block


@pytest.mark.parametrize(
    "lie",
    [
        {"capability": b"x" * 16},
        {"lease": 99},
        {"unit": 7},
        {"handle": BlockHandle(22, 0, 99)},
        {"token_start": 1},
    ],
    ids=lambda lie: next(iter(lie)),
)
@pytest.mark.parametrize("inline", [False, True])
def test_without_a_lease_the_bytes_go_nowhere(lie: dict[str, Any], inline: bool) -> None:
    async def body() -> None:
        both = ShmRig()
        rig = both.rig
        job = rig.reserve(4)
        before = [bytes(block) for block in rig.target.blocks]
        truth = {"capability": job.lease.capability, "handle": job.target[0]}
        payload = memoryview(bytearray(b"!" * FULL))
        if not inline:
            payload = memoryview(both.pool.buffer)[:FULL]
            both.pool.buffer[:FULL] = b"!" * FULL
        done: list[int] = []
        both.sender.send(both.url, DECODE, header(**truth | lie), payload, lambda: done.append(1))
        await until(lambda: done)
        assert rig.received.units_dropped.total() == 1
        assert [bytes(block) for block in rig.target.blocks] == before
        rig.receiver.abort(job.id)
        both.close()

    run(body())


@pytest.mark.parametrize("length", [0, 1, FULL - 1, FULL + 1, 8 * FULL])
@pytest.mark.parametrize("inline", [False, True])
def test_a_payload_of_another_length_is_rejected(length: int, inline: bool) -> None:
    async def body() -> None:
        both = ShmRig()
        payload = memoryview(bytes(length) if inline else both.pool.buffer)[:length]
        await both.rig.check_rejected(both.sender, payload)
        await both.hand_over(30)
        both.close()

    run(body())


@both_ways
def test_a_block_reused_while_it_is_copied_does_not_verify(make: type[ShmRig]) -> None:
    """What makes it safe to give the blocks back when the connection is lost."""

    async def body() -> None:
        both = make()
        rig = both.rig
        job = rig.reserve(8)
        rig.start(job)
        rig.compute(job, [0, 1])
        both.seal()
        rig.source.block_bytes(job.source[1].block_id)[5] ^= 1  # before it left
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "digest")
        rig.check_balance()
        both.close()

    run(body())


# ---------------------------------------------------------------- connections that end


def test_a_receiver_that_closes_ends_all_sends_once() -> None:
    async def body() -> None:
        both = ShmRig()
        rig = both.rig
        job = rig.reserve(40)
        rig.hand_over(job)
        both.receiver.close()
        await until(lambda: not rig.source.touched)
        with pytest.raises(TransferError):  # it says once that the lane was lost
            both.sender.reaches(both.url, DECODE)
        with pytest.raises(TransferError, match="cannot connect") as caught:
            both.sender.send(both.url, DECODE, header(), memoryview(b""), lambda: None)
        assert caught.value.cause == "transport"
        assert not both.sender._lanes
        rig.sender.abort(job.id, "gone")
        await rig.until_ended()
        rig.check_balance()
        both.close()

    run(body())


@both_ways
def test_a_sender_that_closes_gives_its_blocks_back_at_once(make: type[ShmRig]) -> None:
    async def body() -> None:
        both = make()
        rig = both.rig
        job = rig.reserve(40)
        rig.hand_over(job)
        both.seal()
        rig.sender.abort(job.id, "drained")
        both.sender.close()
        assert not rig.source.touched
        both.sender.close()  # twice is once
        await rig.until_ended()
        await until(lambda: not both.receiver.num_peers)
        rig.check_balance()
        both.close()

    run(body())


def test_a_peer_that_takes_nothing_loses_its_lane(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        both = ShmRig()
        rig = both.rig
        asyncio.get_running_loop().remove_reader(both.receiver._listener)  # as if stopped
        job = rig.reserve(40)
        rig.hand_over(job)
        rig.sender.abort(job.id, "gone")
        await asyncio.sleep(0.02)
        assert rig.source.touched == 10
        both.now = 29.9
        both.sender._watch()
        assert rig.source.touched == 10
        both.now = 30.0
        both.sender._watch()
        assert not rig.source.touched
        await rig.until_ended()
        rig.check_balance()
        both.close()

    run(body())
    assert "takes no units" in caplog.text


def test_connections_that_are_not_used_are_closed_when_another_is_opened() -> None:
    async def body() -> None:
        both = ShmRig()
        await both.hand_over(5, "first")
        both.now += 301.0
        other = ShmUnitReceiver(DECODE, both.rig.receiver, both.rig.received)
        both.rig.address = other.address
        await both.hand_over(5, "second")
        assert list(both.sender._lanes) == [(other.address.url, DECODE)]
        await until(lambda: not both.receiver.num_peers)
        other.close()
        both.close()

    run(body())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shm://",
        "tcp://127.0.0.1:1",
        f"shm://{host_id()}/nobody",
        f"shm://{host_id()}/{'0' * 32}",
        f"shm://{host_id()}/{'0' * 32}x",
    ],
)
def test_an_address_where_nobody_is(url: str) -> None:
    async def body() -> None:
        both = ShmRig()
        open_before = num_descriptors()
        for _ in range(3):
            with pytest.raises(TransferError):
                both.sender.reaches(url, DECODE)
            with pytest.raises(TransferError):
                both.sender.send(url, DECODE, header(), memoryview(b""), lambda: None)
        assert num_descriptors() <= open_before
        both.close()

    run(body())


def test_a_sender_without_descriptors_fails_as_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another transport is taken then; an error of another kind would cost the request its node."""

    def no_socket(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def no_file(*_: object) -> str:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def body() -> None:
        both = ShmRig()
        both.sender.close()
        with monkeypatch.context() as poor:
            poor.setattr("kvtransfer.shm_connection.socket.socket", no_socket)
            poor.setattr(Path, "read_text", no_file)
            with pytest.raises(TransferError, match="Too many open files"):
                both.sender.reaches(both.url, DECODE)
        assert both.sender.reaches(both.url, DECODE)
        both.close()

    run(body())


def test_another_host_is_known_before_anything_is_sent() -> None:
    async def body() -> None:
        both = ShmRig()
        boot, _, namespace = host_id().rpartition(".")
        for other in (f"{boot}.{int(namespace, 16) + 1:x}", f"{boot[::-1]}.{namespace}"):
            elsewhere = both.url.replace(host_id(), other)
            assert not both.sender.reaches(elsewhere, DECODE)
            with pytest.raises(TransferError, match="another host"):
                both.sender.send(elsewhere, DECODE, header(), memoryview(b""), lambda: None)
        assert both.sender.reaches(both.url, DECODE)
        both.close()

    run(body())


def test_another_users_processes_are_refused_on_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        both = ShmRig()
        monkeypatch.setattr("kvtransfer.shm_connection.os.getuid", lambda: os.geteuid() + 1)
        with pytest.raises(TransferError):
            both.sender.reaches(both.url, DECODE)
        visitor = visit(both)
        await until_hung_up(visitor)
        assert both.receiver.num_peers == 0
        assert both.rig.received.units_dropped["refused"] >= 1
        visitor.close()
        both.close()

    run(body())


# ---------------------------------------------------------------- hostile streams


def visit(both: ShmRig) -> socket.socket:
    """A connection to the receiver."""
    visitor = socket.socket(socket.AF_UNIX)
    visitor.connect(b"\0baton-kv-" + both.url.rpartition("/")[2].encode())
    visitor.settimeout(0)
    return visitor


def give(visitor: socket.socket, data: bytes, *descriptors: int) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    visitor.sendmsg([data], [rights] if descriptors else [])


GREETING = encode(Envelope(PREFILL, DECODE, RenewLeases(())))


def hello(both: ShmRig) -> bytes:
    return HELLO.pack(MAGIC, len(both.pool), len(GREETING)) + GREETING


async def until_hung_up(visitor: socket.socket) -> None:
    def hung_up() -> bool:
        try:
            return visitor.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    await until(hung_up)


BAD_STREAMS: dict[str, Callable[[ShmRig], bytes]] = {
    "noise": lambda both: b"GET / HTTP/1.1\r\n\r\n" * 9,
    "zeros": lambda both: bytes(1000),
    "short secret": lambda both: pack(header(capability=b"c" * 15), 0),
    "large count": lambda both: pack(header(unit=1 << 31), 0),
    "outside of the pool": lambda both: pack(header(), len(both.pool) - 1),
    "far outside": lambda both: pack(header(), INLINE - 1),
    "nothing, outside": lambda both: pack(header(num_bytes=0), len(both.pool) + 1),
    "inline without end": lambda both: pack(header(num_bytes=1 << 30), INLINE),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_a_malformed_stream_is_counted_and_closed(name: str) -> None:
    async def body() -> None:
        both = ShmRig()
        visitor = visit(both)
        give(visitor, hello(both), both.pool.descriptor)
        visitor.send(BAD_STREAMS[name](both))
        await until_hung_up(visitor)
        assert both.rig.received.units_dropped == {"malformed": 1}
        assert both.receiver.num_peers == 0
        await both.hand_over(30)
        visitor.close()
        both.close()

    run(body())


@pytest.mark.parametrize("count", [0, 2, 30])
def test_a_hello_without_exactly_one_descriptor(count: int) -> None:
    async def body() -> None:
        both = ShmRig()
        visitor = visit(both)
        open_before = num_descriptors()
        give(visitor, hello(both), *[both.pool.descriptor] * count)
        await until_hung_up(visitor)
        assert both.rig.received.units_dropped == {"malformed": 1}
        assert num_descriptors() <= open_before
        await both.hand_over(30)
        visitor.close()
        both.close()

    run(body())


@pytest.mark.parametrize(
    "data",
    [
        b"x",
        HELLO.pack(b"baton-k0", 4096, len(GREETING)) + GREETING,
        HELLO.pack(MAGIC, 0, len(GREETING)) + GREETING,
        HELLO.pack(MAGIC, 1 << 63, len(GREETING)) + GREETING,
        HELLO.pack(MAGIC, 64 * FULL, 0),
        HELLO.pack(MAGIC, 64 * FULL, 1 << 31) + bytes(9),
        HELLO.pack(MAGIC, 64 * FULL, 9) + bytes(9),
    ],
)
def test_a_hello_that_is_none(data: bytes) -> None:
    async def body() -> None:
        both = ShmRig()
        visitor = visit(both)
        give(visitor, data, both.pool.descriptor)
        await until_hung_up(visitor)
        assert both.rig.received.units_dropped == {"malformed": 1}
        visitor.close()
        both.close()

    run(body())


def test_a_descriptor_of_something_else() -> None:
    async def body() -> None:
        both = ShmRig()
        with ordinary_file(len(both.pool)) as plain:
            for descriptor in (plain, both.receiver._listener.fileno()):
                visitor = visit(both)
                give(visitor, hello(both), descriptor)
                await until_hung_up(visitor)
                visitor.close()
        assert both.rig.received.units_dropped == {"malformed": 2}
        both.close()

    run(body())


def test_units_in_pieces_of_one_byte() -> None:
    async def body() -> None:
        both = ShmRig()
        visitor = visit(both)
        give(visitor, hello(both), both.pool.descriptor)
        for byte in pack(header(num_bytes=3), INLINE) + b"abc" + pack(header(), 0):
            visitor.send(bytes([byte]))
            await asyncio.sleep(0)
        answers = b""
        while len(answers) < 2 * ANSWER.size:
            await asyncio.sleep(0.001)
            try:
                answers += visitor.recv(100)
            except BlockingIOError:
                continue
        assert answers == ANSWER.pack(1) * 2
        assert both.rig.received.units_dropped == {"expired": 2}
        visitor.close()
        both.close()

    run(body())


def test_a_peer_that_connects_and_says_nothing_is_forgotten_when_it_goes() -> None:
    async def body() -> None:
        both = ShmRig()
        visitor = visit(both)
        await until(lambda: both.receiver.num_peers == 1)
        visitor.close()
        await until(lambda: both.receiver.num_peers == 0)
        assert not both.rig.received.units_dropped
        both.close()

    run(body())


def test_an_answer_to_nothing_ends_the_lane() -> None:
    async def body() -> None:
        both = ShmRig()
        await both.hand_over(4)
        (peer,) = both.receiver._peers
        peer._socket.send(ANSWER.pack(1))
        await until(lambda: not both.receiver.num_peers)
        with pytest.raises(TransferError):
            both.sender.reaches(both.url, DECODE)
        assert both.sender.reaches(both.url, DECODE)  # the next one may be better
        await both.hand_over(30, "other")
        both.close()

    run(body())


def test_what_is_meant_for_another_life_is_dropped_and_over() -> None:
    async def body() -> None:
        both = ShmRig()
        done: list[int] = []
        payload = memoryview(both.pool.buffer)[:FULL]
        earlier = NodeId(DECODE.name, 9)
        both.sender.send(both.url, earlier, header(), payload, lambda: done.append(1))
        await until(lambda: done)
        assert both.rig.received.units_dropped == {"stale": 1}
        await both.hand_over(30)
        both.close()

    run(body())


def test_bugs_elsewhere_stop_no_other_unit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        both = ShmRig()
        begin, failures = both.rig.receiver.begin, iter([True])

        def fail_once(sender: NodeId, message: UnitHeader) -> Any:
            if next(failures, False):
                raise ValueError("a bug")
            return begin(sender, message)

        def fail() -> None:
            raise ValueError("another bug")

        monkeypatch.setattr(both.rig.receiver, "begin", fail_once)
        payload = memoryview(both.pool.buffer)[:FULL]
        both.sender.send(both.url, DECODE, header(), payload, fail)
        await both.hand_over(30)
        both.close()

    run(body())
    messages = [record.message for record in caplog.records]
    assert messages == ["a unit was not handled", "the end of a send was not handled"]


def test_a_copy_that_fails_rejects_its_lease_and_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        both = ShmRig()
        copy, failures = UnitSealer.copy, iter([False, True])

        def fail_once(sealer: UnitSealer, data: memoryview, target: memoryview) -> bytes:
            if next(failures, False):
                raise MemoryError
            return copy(sealer, data, target)

        monkeypatch.setattr(UnitSealer, "copy", fail_once)
        unlucky, lucky = (both.rig.reserve(12, id=AttemptId(f"r{n}", 1)) for n in range(2))
        both.rig.hand_over(unlucky)
        both.rig.hand_over(lucky)
        await both.rig.until_ended()
        assert (unlucky.lease.state, unlucky.lease.cause) == (LeaseState.REJECTED, "transport")
        assert lucky.lease.state is LeaseState.COMMITTED
        assert both.rig.identical(lucky)
        both.rig.check_balance()
        both.close()

    run(body())
    assert [record.message for record in caplog.records] == ["a unit was not copied"]


def test_no_unit_is_sent_whose_inline_part_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        both = ShmRig()
        monkeypatch.setattr("kvtransfer.shm_sender.MAX_INLINE_BYTES", 100)
        with pytest.raises(TransferError, match="101 bytes"):
            both.sender.send(
                both.url, DECODE, header(num_bytes=101), memoryview(bytes(101)), lambda: None
            )
        await quiet()
        assert not both.rig.received.units_dropped
        both.close()

    run(body())


def is_listening(name: str) -> bool:
    return f"@baton-kv-{name}" in Path("/proc/net/unix").read_text()


def test_no_descriptor_and_no_file_is_left() -> None:
    def shared_files() -> set[str]:
        return {name for name in os.listdir("/dev/shm") if "baton" in name}

    async def body() -> None:
        both = ShmRig()
        await both.hand_over(30)
        name = both.url.rpartition("/")[2]
        assert is_listening(name)
        both.close()
        assert not is_listening(name)

    open_before, files_before = num_descriptors(), shared_files()
    run(body())
    assert shared_files() == files_before
    assert num_descriptors() <= open_before + 1


def test_a_grant_for_two_transports_names_the_one_that_is_used() -> None:
    async def body() -> None:
        both = ShmRig()
        job = both.rig.reserve(9)
        elsewhere = replace(both.receiver.address, transport="pigeon", url="pigeon://1")
        job.grant = replace(job.grant, transports=(elsewhere, both.receiver.address))
        both.rig.hand_over(job)
        await both.rig.until_ended()
        assert both.rig.identical(job)
        both.close()

    run(body())
