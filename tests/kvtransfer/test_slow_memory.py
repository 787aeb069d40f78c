"""Memory that takes its time: what is read and written late is as right, and nothing is leaked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from kvtransfer.lease import LeaseState
from kvtransfer.loopback import Delivery
from tests.kvtransfer.rig import ID, LAYOUT, Job, Rig, quiet, run, until
from tests.kvtransfer.slow_pool import SlowPool
from wire.geometry import Geometry
from wire.handoff_messages import Commit
from wire.types import AttemptId

TOKENS = 14  # three full blocks and a half full one


def slow(rig: Rig) -> tuple[SlowPool, SlowPool]:
    return cast(SlowPool, rig.source), cast(SlowPool, rig.target)


async def finish(rig: Rig) -> None:
    """Everything that is asked for happens, until nothing is open."""
    async with asyncio.timeout(20):
        while len(rig.sender) or len(rig.receiver.table) or rig.source.touched:
            for pool in slow(rig):
                pool.go_on()
            await asyncio.sleep(0)


def committed(rig: Rig, job: Job) -> bool:
    return job.lease.state is LeaseState.COMMITTED and rig.identical(job)


@pytest.mark.parametrize("window_bytes", [32 << 20, LAYOUT.block_bytes])
@pytest.mark.parametrize("geometry", [Geometry(), Geometry(2)], ids=str)
def test_a_handoff(geometry: Geometry, window_bytes: int) -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool, geometry=geometry, window_bytes=window_bytes)
        job = rig.reserve(TOKENS)
        rig.hand_over(job)
        await finish(rig)
        assert committed(rig, job)
        rig.check_balance()

    run(body())


def test_the_commit_waits_until_all_units_are_sealed() -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        job = rig.reserve(TOKENS)
        rig.hand_over(job)
        source, _ = slow(rig)
        await quiet()
        assert len(source.waiting) == 2, "a chunk is read in one go"
        source.go_on(1)
        await quiet()
        assert not any(isinstance(message, Commit) for message in rig.heard_by_decode)
        source.go_on(1)
        await quiet()
        assert any(isinstance(message, Commit) for message in rig.heard_by_decode)
        await finish(rig)
        assert committed(rig, job)
        rig.check_balance()

    run(body())


def test_a_block_that_is_told_again_is_sealed_once() -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        job = rig.reserve(TOKENS)
        rig.start(job)
        for _ in range(3):
            rig.compute(job, range(4))
        source, _ = slow(rig)
        assert len(source.waiting) == 1
        assert source.touched == 4
        rig.sender.first_token(job.id, (7,))
        await finish(rig)
        assert committed(rig, job)
        rig.check_balance()

    run(body())


@pytest.mark.parametrize("reads_over", [0, 1, 2])
def test_a_handoff_that_ends_while_units_are_read_lets_go_of_their_blocks(reads_over: int) -> None:
    """Nothing of it is sent any more, and no block is free before the device has let go of it."""

    async def body() -> None:
        rig = Rig(make_pool=SlowPool, window_bytes=1)  # sealed first, read when it is their turn
        job = rig.reserve(TOKENS)
        rig.start(job)
        rig.compute(job, range(4))
        source, _ = slow(rig)
        source.go_on(reads_over)
        assert source.touched
        rig.sender.abort(job.id, "revoked")
        left = len(source.waiting)
        source.release(job.source)
        assert bool(source.quarantined) == bool(left)
        source.go_on()
        await finish(rig)
        rig.check_balance()

    run(body())


def test_who_waits_for_memory_goes_on_when_another_handoff_ends_unsent() -> None:
    """What it had claimed is free again without any send that would tell of it."""

    async def body() -> None:
        rig = Rig(make_pool=SlowPool, max_sending_bytes=2 * LAYOUT.block_bytes)
        first, second = rig.reserve(TOKENS), rig.reserve(TOKENS, id=AttemptId("second", 1))
        for job in (first, second):
            rig.start(job)
            rig.compute(job, range(4))
            rig.sender.first_token(job.id, (7,))
        source, _ = slow(rig)
        source.go_on(2)  # the digests of both; two units of the first one are being read
        assert source.waiting
        assert not rig.sent.bytes_sent
        rig.sender.abort(first.id, "revoked")
        await finish(rig)
        assert committed(rig, second)
        rig.check_balance()

    run(body())


def test_a_read_that_fails_lets_go_of_all_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        job = rig.reserve(TOKENS)
        rig.start(job)
        source, _ = slow(rig)

        def broken(*args: object, **more: object) -> None:
            raise MemoryError

        monkeypatch.setattr(source, "read", broken)
        with pytest.raises(MemoryError):
            rig.compute(job, range(4))
        assert not source.touched
        rig.sender.fail(job.id, "internal")
        rig.receiver.abort(job.id)
        monkeypatch.undo()
        await rig.until_ended()
        rig.check_balance()

    run(body())


@pytest.mark.parametrize("ends", ["aborted", "expired", "rebound"])
def test_a_lease_that_ends_while_units_are_written_keeps_its_blocks_until_then(ends: str) -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        job = rig.reserve(4)
        source, target = slow(rig)
        rig.hand_over(job)
        source.go_on()
        await quiet()
        await until(lambda: target.waiting)
        if ends == "expired":
            rig.pass_time(100.0)
        elif ends == "aborted":
            rig.receiver.abort(job.id)
        else:
            rig.reserve(4, id=replace(ID, attempt=2), rebinds=True)
        assert job.lease.state in (LeaseState.EXPIRED, LeaseState.REVOKED)
        assert target.quarantined == {job.target[0].block_id}
        target.go_on()
        assert not target.quarantined
        if ends == "rebound":
            rig.receiver.abort(replace(ID, attempt=2))
        await finish(rig)
        rig.check_balance()

    run(body())


def test_a_write_that_fails_rejects_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        job = rig.reserve(4)
        _, target = slow(rig)
        monkeypatch.setattr(target, "_write", lambda units, dtype, tell, seed: tell(None))
        rig.hand_over(job)
        await finish(rig)
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        rig.check_balance()

    run(body())


def test_what_is_written_is_what_is_verified() -> None:
    """The digest is the memory's own, not one of what came by on the host."""

    async def body() -> None:
        rig = Rig(make_pool=SlowPool)
        rig.network.faults = lambda header: Delivery(flip_bit=30 * (header.unit == 1))
        job = rig.reserve(TOKENS)
        rig.hand_over(job)
        await finish(rig)
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "digest")
        rig.check_balance()

    run(body())
