"""Units that a device reads out of another process's pool, with host memory in the device's place.

What it has in common with shm is tested with that (`test_shm_transport`, `test_shm_processes`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from kvtransfer.block_memory import DeviceBytes
from kvtransfer.cuda_ipc_transport import NAME, CudaIpcUnitSender, cuda_ipc_receiver
from kvtransfer.device_pool import ALIGNMENT, HostDeviceMapping, OpenPool
from kvtransfer.lease import LeaseState
from kvtransfer.shm_transport import ShmUnitReceiver
from tests.kvtransfer.device_memory import DeviceMemory
from tests.kvtransfer.rig import DECODE, LAYOUT, PREFILL, Rig, header, quiet, run, until
from wire.errors import TransferError
from wire.types import AttemptId, BlockHandle, TransportAddress

FULL = LAYOUT.block_bytes
MAPPED: list[HostDeviceMapping] = []


class Mapping(HostDeviceMapping):
    """One that a test can ask whether it is still there."""

    closed = False

    def __init__(self, descriptor: int, num_bytes: int) -> None:
        super().__init__(descriptor, num_bytes)
        MAPPED.append(self)

    def close(self) -> None:
        self.closed = True
        super().close()


@dataclass
class IpcRig:
    """Two nodes with devices, connected by cuda-ipc alone."""

    open_pool: OpenPool = Mapping
    rig: Rig = field(init=False)
    lost: list[TransportAddress] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rig = Rig(make_pool=DeviceMemory)
        self.source = cast(DeviceMemory, self.rig.source)
        self.target = cast(DeviceMemory, self.rig.target)
        self.receiver = self.new_receiver()
        self.sender = CudaIpcUnitSender(PREFILL, self.source.shared, self._lost)
        self.rig.use(self.sender, self.receiver.address)

    def new_receiver(self) -> ShmUnitReceiver:
        return cuda_ipc_receiver(DECODE, self.rig.receiver, self.rig.received, self.open_pool)

    def _lost(self, address: TransportAddress, error: TransferError) -> None:
        self.lost.append(address)
        self.rig.sender.lost(address, error)

    def place(self, start: int, num_bytes: int = FULL) -> DeviceBytes:
        return DeviceBytes(self.source.shared.address + start, num_bytes)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
        self.source.shared.close()


def test_full_units_are_read_by_the_device_and_partial_ones_travel_inline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        both = IpcRig()
        seen: list[type] = []
        write = both.target._write

        def watch(units: Any, *rest: Any) -> None:
            seen.extend(type(unit.data) for unit in units)
            write(units, *rest)

        monkeypatch.setattr(both.target, "_write", watch)
        await both.rig.hand_over_well(11)
        assert sorted(kind.__name__ for kind in seen) == [
            "DeviceBytes",
            "DeviceBytes",
            "memoryview",
        ]
        both.close()

    run(body())


def test_a_block_is_the_senders_until_the_device_has_read_it() -> None:
    async def body() -> None:
        both = IpcRig()
        both.target.held = True
        job = both.rig.reserve(8)
        both.rig.hand_over(job)
        await until(lambda: len(both.target.waiting) == 2)
        await quiet()
        assert both.source.touched == 2
        both.target.go_on(1)
        await until(lambda: both.source.touched == 1)
        both.target.go_on()
        await both.rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        both.rig.check_balance()
        both.close()

    run(body())


def test_units_that_are_over_out_of_order_are_answered_in_order() -> None:
    """Who is told a number of units must not take the second for the first."""

    async def body() -> None:
        both = IpcRig()
        both.target.held = True
        job = both.rig.reserve(12)
        both.rig.start(job)
        both.rig.compute(job, range(3))
        await until(lambda: len(both.target.waiting) == 3)
        first = both.target.waiting.popleft()
        both.target.go_on()
        await asyncio.sleep(0.02)
        assert both.source.touched == 3, "the first one is still read"
        first()
        await until(lambda: not both.source.touched)
        both.rig.sender.first_token(job.id, (7,))
        await both.rig.until_ended()
        assert both.rig.identical(job)
        both.close()

    run(body())


@pytest.mark.parametrize(
    "lie",
    [
        {"capability": b"x" * 16},
        {"lease": 99},
        {"unit": 7},
        {"handle": BlockHandle(22, 0, 99)},
        {"num_bytes": FULL - 16},
    ],
    ids=lambda lie: next(iter(lie)),
)
def test_without_a_right_nothing_is_read(lie: dict[str, Any]) -> None:
    async def body() -> None:
        both = IpcRig()
        job = both.rig.reserve(4)
        before = [bytes(block) for block in both.target.blocks]
        truth = {"capability": job.lease.capability, "handle": job.target[0]}
        done: list[int] = []
        place = both.place(0, lie.get("num_bytes", FULL))
        both.sender.send_from_device(
            both.receiver.address.url, DECODE, header(**truth | lie), place, lambda: done.append(1)
        )
        await until(lambda: done)
        assert not both.target.waiting
        assert [bytes(block) for block in both.target.blocks] == before
        both.rig.receiver.abort(job.id)
        both.close()

    run(body())


@pytest.mark.parametrize("start", [1, 8, ALIGNMENT - 1])
def test_an_odd_place_ends_the_connection_before_it_ends_the_device(start: int) -> None:
    async def body() -> None:
        both = IpcRig()
        job = both.rig.reserve(4)
        lie = header(capability=job.lease.capability, handle=job.target[0])
        url = both.receiver.address.url
        both.sender.send_from_device(url, DECODE, lie, both.place(start), lambda: None)
        await until(lambda: both.lost)
        assert both.rig.received.units_dropped["malformed"] == 1
        assert not both.target.waiting
        both.rig.receiver.abort(job.id)
        both.close()

    run(body())


def test_memory_outside_of_the_pool_is_not_sent() -> None:
    async def body() -> None:
        both = IpcRig()
        size = len(both.source.shared)
        for start in (-FULL, size - FULL + 16, size):
            with pytest.raises(TransferError, match="outside of the pool"):
                both.sender.send_from_device(
                    both.receiver.address.url, DECODE, header(), both.place(start), lambda: None
                )
        both.close()

    run(body())


def test_a_pool_stays_mapped_until_nothing_reads_it() -> None:
    """Its owner has died, and the device is in the middle of a copy."""

    async def body() -> None:
        MAPPED.clear()
        both = IpcRig()
        both.target.held = True
        job = both.rig.reserve(8)
        both.rig.hand_over(job)
        await until(lambda: len(both.target.waiting) == 2)
        both.sender.close()
        await until(lambda: not both.receiver.num_peers)
        (mapping,) = MAPPED
        assert not cast(Mapping, mapping).closed
        both.target.go_on(1)
        assert not cast(Mapping, mapping).closed
        both.target.go_on()
        assert cast(Mapping, mapping).closed
        await both.rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED, "all was there"
        both.rig.check_balance()
        both.close()

    run(body())


def test_a_block_that_was_reused_under_the_copy_does_not_verify() -> None:
    async def body() -> None:
        both = IpcRig()
        both.target.held = True
        job = both.rig.reserve(8)
        both.rig.hand_over(job)
        await until(lambda: len(both.target.waiting) == 2)
        both.source.block_bytes(job.source[1].block_id)[3] ^= 1
        both.target.go_on()
        await both.rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "digest")
        both.rig.check_balance()
        both.close()

    run(body())


@pytest.mark.parametrize("ends", ["expired", "revoked"])
def test_a_lease_that_ends_under_the_copy_keeps_its_block_until_it_is_over(ends: str) -> None:
    async def body() -> None:
        both = IpcRig()
        both.target.held = True
        job = both.rig.reserve(4)
        both.rig.hand_over(job)
        await until(lambda: both.target.waiting)
        if ends == "expired":
            both.rig.pass_time(100.0)
        else:
            both.rig.receiver.abort(job.id)
        assert both.target.quarantined == {job.target[0].block_id}
        both.target.go_on()
        await both.rig.until_ended()
        both.rig.check_balance()
        both.close()

    run(body())


def test_a_node_that_cannot_map_the_pool_is_given_up_at_once() -> None:
    """As two GPUs without a way between them: the handoff ends, and the way is not tried again."""

    def cannot(descriptor: int, num_bytes: int) -> HostDeviceMapping:
        raise OSError(101, "cuMemSetAccess: invalid device ordinal")

    async def body() -> None:
        both = IpcRig(cannot)
        job = both.rig.reserve(8)
        both.rig.hand_over(job)
        await both.rig.until_ended()
        assert both.rig.handoffs[0].cause == "transport"
        assert [address.transport for address in both.lost] == [NAME]
        url = both.receiver.address.url
        assert not both.sender.reaches(url, DECODE)
        both.rig.check_balance()
        both.receiver.close()
        both.receiver.open_pool = Mapping
        both.receiver = ShmUnitReceiver(
            DECODE, both.rig.receiver, both.rig.received, name=NAME, open_pool=Mapping
        )
        both.rig.address = both.receiver.address
        assert both.sender.reaches(both.receiver.address.url, DECODE), "another life's address"
        both.close()

    run(body())


def test_a_write_that_fails_rejects_its_lease_and_ends_its_send(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise MemoryError

    async def body() -> None:
        both = IpcRig()
        monkeypatch.setattr(both.target, "write", broken)
        job = both.rig.reserve(4)
        both.rig.hand_over(job)
        await both.rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        both.rig.check_balance()
        monkeypatch.undo()
        await both.rig.hand_over_well(30)
        assert not both.lost
        both.close()

    run(body())


def test_many_handoffs_at_once() -> None:
    async def body() -> None:
        both = IpcRig()
        jobs = [both.rig.reserve(9 + n, id=AttemptId(f"r{n}", 1)) for n in range(9)]
        for job in jobs:
            both.rig.hand_over(job)
        await both.rig.until_ended()
        assert all(both.rig.identical(job) for job in jobs)
        both.rig.check_balance()
        both.close()

    run(body())
