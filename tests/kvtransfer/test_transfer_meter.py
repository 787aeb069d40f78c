"""What a committed handoff tells about itself."""

from __future__ import annotations

import asyncio

from kvtransfer.transfer_meter import TransferMeter
from telemetry import metrics as names
from tests.kvtransfer.rig import LAYOUT, Rig
from wire.request_messages import TransferRecord

BLOCK_BYTES = LAYOUT.block_bytes


def test_the_phases_of_a_transfer() -> None:
    meter = TransferMeter()
    meter.pass_over(10.0)
    meter.sent(100, "shm", 10.5)
    meter.sent(100, "shm", 11.0)
    meter.pass_over(12.0)
    meter.sent(50, "shm", 12.0)
    meter.first_token(12.5)
    assert meter.record(14.0) == TransferRecord(
        transport="shm",
        num_units=3,
        num_bytes=250,
        seconds=3.5,
        tail_bytes=50,
        tail_s=2.0,
        commit_wait_s=1.5,
    )


def test_a_transfer_without_units() -> None:
    meter = TransferMeter()
    meter.first_token(1.0)
    record = meter.record(0.5)  # a clock that stands still must not make times negative
    assert record == TransferRecord("", 0, 0, 0.0, 0, 0.0, 0.0)


def test_a_handoff_counts_its_transfer_once() -> None:
    async def scenario() -> None:
        rig = Rig()
        job = rig.reserve(4 * LAYOUT.block_size)
        rig.start(job)
        assert rig.sender.num_by_state() == {"computing": 1, "sending": 0, "awaiting_commit": 0}
        assert rig.receiver.table.num_by_state()["granted"] == 1
        rig.compute(job, range(3))
        rig.now += 2.0
        rig.compute(job, range(3, 4))
        rig.now += 0.25
        rig.sender.first_token(job.id, (7,))
        rig.now += 0.5
        await rig.until_ended()
        (handoff,) = rig.handoffs
        assert handoff.transfer == TransferRecord(
            "loopback", 4, 4 * BLOCK_BYTES, 2.75, BLOCK_BYTES, 0.75, 0.5
        )
        totals = {
            metric: (buckets["loopback"].count, buckets["loopback"].total)
            for metric, buckets in rig.sent.histograms.items()
        }
        assert totals == {
            names.TRANSFER_BYTES: (1, 4 * BLOCK_BYTES),
            names.TRANSFER_SECONDS: (1, 2.75),
            names.TRANSFER_RATE: (1, 4 * BLOCK_BYTES / 2.75),
            names.TRANSFER_TAIL_BYTES: (1, BLOCK_BYTES),
            names.TRANSFER_TAIL_SECONDS: (1, 0.75),
            names.TRANSFER_COMMIT_WAIT: (1, 0.5),
        }
        assert not any(rig.sender.num_by_state().values())
        assert not any(rig.receiver.table.num_by_state().values())

    asyncio.run(scenario())


def test_a_handoff_that_failed_counts_none() -> None:
    async def scenario() -> None:
        rig = Rig()
        job = rig.reserve(4 * LAYOUT.block_size)
        rig.start(job)
        rig.compute(job, range(4))
        rig.sender.abort(job.id, "revoked")
        rig.source.release(job.source)
        await rig.until_ended()
        assert rig.handoffs[0].transfer is None
        assert not rig.sent.histograms

    asyncio.run(scenario())


def test_all_cached_is_a_transfer_of_nothing() -> None:
    async def scenario() -> None:
        rig = Rig()
        job = rig.reserve(2 * LAYOUT.block_size, num_cached_tokens=2 * LAYOUT.block_size)
        rig.start(job)
        rig.compute(job, range(2))
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert rig.handoffs[0].transfer is not None
        assert rig.sent.histograms[names.TRANSFER_BYTES]["none"].total == 0
        assert names.TRANSFER_RATE not in rig.sent.histograms

    asyncio.run(scenario())
