"""Handoffs between nodes that store their KV differently: block size, type, sharding."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.digest import UnitSealer
from kvtransfer.handoff import HandoffState
from kvtransfer.lease import LeaseState
from kvtransfer.loopback import Delivery
from kvtransfer.sender import KVSender
from tests.kvtransfer.pool import Pool
from tests.kvtransfer.rig import DECODE, PREFILL, Job, Rig, quiet, until
from tests.kvtransfer.stores import blocks_with, computed, read_back
from wire.errors import TransferError
from wire.geometry import SCALED_DTYPES, Geometry, geometry_for
from wire.layout import KVLayout
from wire.messages import Message

SMALL = KVLayout(num_layers=4, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
LARGE = replace(SMALL, block_size=8)
ODD = replace(SMALL, block_size=3, dtype="float16")


def fill(rig: Rig, job: Job) -> None:
    """The source holds what a model computes."""
    model = computed(rig.source.layout, len(job.tokens), seed=5)
    for handle, block in zip(job.source, blocks_with(model, rig.source.layout), strict=True):
        rig.source.block_bytes(handle.block_id)[:] = block


def received(rig: Rig, job: Job) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    blocks = [rig.target.blocks[handle.block_id] for handle in job.target]
    numbers = read_back(blocks, rig.target.layout)[:, :, job.num_cached_tokens : len(job.tokens)]
    return np.asarray(numbers)


def wanted(rig: Rig, job: Job) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    model = computed(rig.source.layout, len(job.tokens), seed=5)
    return np.asarray(model[:, :, job.num_cached_tokens :])


async def hand_over(rig: Rig, job: Job, *, layer_by_layer: bool = True) -> None:
    """Block by block, the layers of each one after the other."""
    rig.start(job)
    for index, handle in enumerate(job.source):
        for num_layers in range(1, SMALL.num_layers) if layer_by_layer else ():
            rig.sender.blocks_finished(job.id, [(index, handle)], num_layers)
        rig.sender.blocks_finished(job.id, [(index, handle)])
    rig.sender.first_token(job.id, (7,))
    await rig.until_ended()


@pytest.mark.parametrize("num_layer_groups", [1, 3])
@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(1, 0), (8, 0), (21, 0), (29, 24), (24, 24)]
)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (SMALL, LARGE),
        (LARGE, SMALL),
        (ODD, LARGE),
        (LARGE, ODD),
        (SMALL, replace(SMALL, dtype="bfloat16")),
        (replace(SMALL, dtype="bfloat16"), LARGE),
    ],
    ids=str,
)
def test_every_number_finds_its_slot(
    source: KVLayout, target: KVLayout, num_tokens: int, num_cached: int, num_layer_groups: int
) -> None:
    async def body() -> None:
        geometry = replace(geometry_for(target, source), num_layer_groups=num_layer_groups)
        rig = Rig(layout=target, source_layout=source, geometry=geometry)
        job = rig.reserve(num_tokens, num_cached_tokens=num_cached)
        fill(rig, job)
        untouched = [bytes(rig.target.blocks[h.block_id]) for h in job.target]
        await hand_over(rig, job)
        assert job.lease.state is LeaseState.COMMITTED
        assert np.array_equal(received(rig, job), wanted(rig, job))
        for handle, before in list(zip(job.target, untouched, strict=True))[
            : num_cached // target.block_size
        ]:
            assert bytes(rig.target.blocks[handle.block_id]) == before
        rig.check_balance()

    asyncio.run(body())


@pytest.mark.parametrize("dtype", SCALED_DTYPES)
def test_eight_bits_are_half_the_bytes_and_about_the_numbers(dtype: str) -> None:
    async def body() -> None:
        target = replace(SMALL, head_dim=64)
        geometry = geometry_for(target, target, dtype)
        rig = Rig(layout=target, geometry=geometry)
        job = rig.reserve(21)
        fill(rig, job)
        await hand_over(rig, job)
        assert job.lease.state is LeaseState.COMMITTED
        error = np.abs(received(rig, job) - wanted(rig, job))
        assert 0 < error.max() <= 100 / 16
        assert rig.sent.bytes_sent * 64 * 4 == 21 * target.bytes_per_token * (64 + 4)
        rig.check_balance()

    asyncio.run(body())


@pytest.mark.parametrize("source", [SMALL, LARGE, ODD], ids=str)
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("unit", range(6))
def test_a_flipped_bit_in_any_slice_is_caught(
    source: KVLayout, unit: int, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a control that sees the damage: without digests it reaches a committed lease."""

    async def body() -> None:
        geometry = replace(geometry_for(LARGE, source), num_layer_groups=2)
        fault = Delivery(flip_bit=30)  # of an exponent
        rig = Rig(layout=LARGE, source_layout=source, geometry=geometry)
        rig.network.faults = lambda header: fault if header.unit == unit else Delivery()
        job = rig.reserve(21)
        fill(rig, job)
        await hand_over(rig, job)
        if checked:
            assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "digest")
        else:
            assert job.lease.state is LeaseState.COMMITTED
            assert not np.array_equal(received(rig, job), wanted(rig, job))
        rig.check_balance()

    if not checked:
        monkeypatch.setattr(UnitSealer, "seal", lambda *_: b"0" * 16)
    asyncio.run(body())


def test_a_preempted_request_sends_from_its_new_blocks_only() -> None:
    """The first of two source blocks of a unit is finished, then both are computed anew."""

    async def body() -> None:
        rig = Rig(layout=LARGE, source_layout=SMALL, geometry=Geometry(2))
        job = rig.reserve(8)
        fill(rig, job)
        rig.start(job)
        rig.compute(job, [0])
        old = job.source
        rig.source.release(old)
        rig.sender.blocks_finished(job.id, [(1, old[1])], 2)  # said before, heard late
        assert not rig.sent.bytes_sent
        job.source = rig.source.filled(2, seed=9)
        fill(rig, job)
        rig.compute(job, range(2))
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert np.array_equal(received(rig, job), wanted(rig, job))
        rig.check_balance()

    asyncio.run(body())


# ---------------------------------------------------------------- several ranks

WHOLE = replace(SMALL, num_kv_heads=4)


def rank_of(layout: KVLayout, rank: int, size: int) -> KVLayout:
    heads = layout.num_kv_heads // size
    return replace(layout, num_kv_heads=heads, tp_rank=rank, tp_size=size)


class Ranks(Rig):
    """Two ranks of one prefill node fill the blocks of an unsharded decode node."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.other_source = Pool(rank_of(WHOLE, 1, 2), epoch=12)
        self.other = KVSender(
            memory=self.other_source,
            transports={self.address.transport: self.network.sender(PREFILL)},
            send=lambda grant, message: self.to_decode(message),
            on_ended=self.handoffs.append,
            model_fingerprint="model",
            stats=self.sent,
            clock=lambda: self.now,
        )

    def to_prefill(self, message: Message) -> None:
        super().to_prefill(message)
        self._post(DECODE, PREFILL, message, self.heard_by_prefill, self.other.handle)

    def work(self, job: Job, rank: int) -> None:
        """All that one rank does."""
        sender, pool = [(self.sender, self.source), (self.other, self.other_source)][rank]
        handles = job.source if rank == 0 else pool.filled(len(job.source), seed=1)
        model = computed(pool.layout, len(job.tokens), seed=5)
        for handle, block in zip(handles, blocks_with(model, pool.layout), strict=True):
            pool.block_bytes(handle.block_id)[:] = block
        sender.start(job.id, job.grant, tokens=job.tokens, cache_salt="salt", deadline_s=100.0)
        sender.blocks_finished(job.id, list(enumerate(handles)))
        sender.first_token(job.id, (7,))


def ranks() -> Ranks:
    source = rank_of(WHOLE, 0, 2)
    geometry = replace(geometry_for(LARGE_WHOLE, source), num_layer_groups=2)
    assert geometry.num_head_groups == 2
    return Ranks(layout=LARGE_WHOLE, source_layout=source, geometry=geometry)


LARGE_WHOLE = replace(WHOLE, block_size=8)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_ranks_fill_one_block_and_both_commit(order: tuple[int, int]) -> None:
    async def body() -> None:
        rig = ranks()
        job = rig.reserve(21, num_cached_tokens=8)
        rig.work(job, order[0])
        await quiet()
        assert (job.lease.state,) == (LeaseState.RECEIVING,), "half of the heads are missing"
        assert not rig.handoffs
        rig.work(job, order[1])
        await rig.until_ended()
        await until(lambda: len(rig.handoffs) == 2)
        assert job.lease.state is LeaseState.COMMITTED
        assert [h.state for h in rig.handoffs] == [HandoffState.DONE] * 2
        assert np.array_equal(received(rig, job), wanted(rig, job))
        rig.check_balance()

    asyncio.run(body())


def test_a_rank_that_is_asked_again_does_not_stand_for_the_other() -> None:
    async def body() -> None:
        rig = ranks()
        job = rig.reserve(21)
        rig.work(job, 0)
        for _ in range(3):
            await quiet()
            rig.pass_time(1.0)  # its commit is asked again
        assert job.lease.live
        rig.pass_time(200.0)
        await rig.until_ended()
        assert job.lease.state is LeaseState.EXPIRED
        rig.check_balance()

    asyncio.run(body())


def test_damage_in_the_second_ranks_part_is_caught() -> None:
    async def body() -> None:
        rig = ranks()
        job = rig.reserve(21)
        heads = {unit.index: unit.head_start for unit in job.lease.units.values()}
        fault = Delivery(flip_bit=30)
        rig.network.faults = lambda header: fault if heads[header.unit] else Delivery()
        rig.work(job, 0)
        rig.work(job, 1)
        await rig.until_ended()
        await until(lambda: len(rig.handoffs) == 2)
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "digest")
        assert {handoff.cause for handoff in rig.handoffs} == {"digest"}
        rig.check_balance()

    asyncio.run(body())


@pytest.mark.parametrize("size", [2, 4])
def test_one_sender_fills_the_ranks_of_a_sharded_decode_node(size: int) -> None:
    """Each rank grants a lease of its own, and gets its heads out of the same blocks."""

    async def body() -> None:
        model = computed(WHOLE, 21, seed=5)
        for rank in range(size):
            target = rank_of(LARGE_WHOLE, rank, size)
            rig = Rig(layout=target, source_layout=WHOLE, geometry=geometry_for(target, WHOLE))
            job = rig.reserve(21, num_cached_tokens=8)
            fill(rig, job)
            await hand_over(rig, job)
            assert job.lease.state is LeaseState.COMMITTED
            first, end = target.head_range
            assert np.array_equal(received(rig, job), model[:, :, 8:, first:end])
            rig.check_balance()

    asyncio.run(body())


def test_a_cut_that_no_rank_can_serve_is_refused() -> None:
    async def body() -> None:
        rig = ranks()
        job = rig.reserve(21)
        for geometry in (Geometry(2, 1), Geometry(2, 4)):
            with pytest.raises(TransferError) as caught:
                rig.sender.start(
                    job.id,
                    replace(job.grant, geometry=geometry),
                    tokens=job.tokens,
                    cache_salt="salt",
                    deadline_s=1.0,
                )
            assert caught.value.cause == "refused"
        rig.receiver.abort(job.id)
        await rig.until_ended()
        rig.check_balance()

    asyncio.run(body())
