"""Handoffs between nodes that store their KV differently: block size, type, sharding."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from kvtransfer.digest import UnitSealer
from kvtransfer.lease import LeaseState
from kvtransfer.loopback import Delivery
from tests.kvtransfer.rig import Job, Rig
from tests.kvtransfer.stores import blocks_with, computed, read_back
from wire.geometry import SCALED_DTYPES, Geometry, geometry_for
from wire.layout import KVLayout

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
        monkeypatch.setattr(UnitSealer, "digest", lambda *_: b"0" * 16)
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
