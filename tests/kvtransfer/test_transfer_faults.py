"""Every kind of damage on the way is caught, and a control shows that it would have been seen.

The control makes all digests equal, so that nothing is compared any more: then the same damage
reaches COMMITTED, and the receiver's memory differs from the sender's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.digest import UnitSealer
from kvtransfer.lease import LeaseState
from kvtransfer.loopback import Delivery, LoopbackSender
from kvtransfer.units import unit_bytes
from tests.kvtransfer.rig import LAYOUT, PREFILL, TTL, Job, Rig, quiet, until
from wire.geometry import Geometry
from wire.handoff_messages import LeaseEnded, UnitHeader
from wire.types import AttemptId, NodeId

NUM_TOKENS = 14  # three full blocks and a half full one
LAST = 3


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


@pytest.fixture(params=["checked", "control"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "control":
        monkeypatch.setattr(UnitSealer, "seal", lambda *_: b"0" * 16)
    return bool(request.param == "checked")


def check_verdict(rig: Rig, job: Job, checked: bool, cause: str = "digest") -> None:
    if checked:
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, cause)
        assert rig.handoffs[0].cause == cause
        assert rig.received.handoffs == {cause: 1}
    else:
        assert job.lease.state is LeaseState.COMMITTED
        assert not rig.identical(job), "the damage left no trace, so the test could not see it"
    rig.check_balance()


def only(unit: int, **fault: Any) -> Callable[[UnitHeader], Delivery]:
    return lambda header: Delivery(**fault) if header.unit == unit else Delivery()


# ---------------------------------------------------------------- damage by the transport


@pytest.mark.parametrize("unit", [0, 2, LAST])
@pytest.mark.parametrize("bit", [0, 777, -1])
def test_a_flipped_bit(unit: int, bit: int, checked: bool) -> None:
    async def body() -> None:
        size = LAYOUT.bytes_per_token * (2 if unit == LAST else 4) * 8
        rig = Rig(faults=only(unit, flip_bit=bit % size))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await rig.until_ended()
        check_verdict(rig, job, checked)

    run(body())


@pytest.mark.parametrize("unit", [1, LAST])
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_truncated_unit(unit: int, length: int) -> None:
    """Caught by its length even where digests are not compared; the memory shows the damage."""

    async def body() -> None:
        size = LAYOUT.bytes_per_token * (2 if unit == LAST else 4)
        rig = Rig(faults=only(unit, truncate_to=length % size))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await rig.until_ended()
        assert not rig.identical(job)
        check_verdict(rig, job, checked=True, cause="transport")

    run(body())


@dataclass
class Swapping(LoopbackSender):
    """Two units arrive under each other's header."""

    held: tuple[Any, ...] | None = None

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        if header.unit == 0:
            self.held = (header, payload, on_done)
        elif header.unit == 1 and self.held is not None:
            first_header, first_payload, first_done = self.held
            super().send(url, to, first_header, payload, on_done)
            super().send(url, to, header, first_payload, first_done)
        else:
            super().send(url, to, header, payload, on_done)


def test_swapped_units(checked: bool) -> None:
    async def body() -> None:
        rig = Rig()
        rig.use(Swapping(rig.network, PREFILL), rig.address)
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await rig.until_ended()
        check_verdict(rig, job, checked)

    run(body())


@pytest.mark.parametrize("unit", range(8))
def test_a_flipped_bit_in_any_layer_group(unit: int, checked: bool) -> None:
    async def body() -> None:
        rig = Rig(geometry=Geometry(2), faults=only(unit, flip_bit=9))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await rig.until_ended()
        check_verdict(rig, job, checked)

    run(body())


def test_swapped_layer_groups(checked: bool) -> None:
    """Units 0 and 1 are two layer groups of one block: same tokens, same length."""

    async def body() -> None:
        rig = Rig(geometry=Geometry(2))
        rig.use(Swapping(rig.network, PREFILL), rig.address)
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await rig.until_ended()
        check_verdict(rig, job, checked)

    run(body())


def test_memory_that_changed_between_seal_and_send(checked: bool) -> None:
    """A late zero-copy send reads whatever the block holds by then."""

    async def body() -> None:
        rig = Rig(faults=only(1, delay_s=0.01))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        truth = rig.source.content(job.source[1], LAYOUT.block_size)
        rig.source.block_bytes(job.source[1].block_id)[5] ^= 1
        await rig.until_ended()
        rig.source.block_bytes(job.source[1].block_id)[:] = truth
        check_verdict(rig, job, checked)

    run(body())


def test_a_unit_of_another_prompt(checked: bool) -> None:
    """Right place, right length, right key, wrong request: bytes of a block that was reused."""

    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        stranger = rig.source.filled(1, seed=5)[0]
        rig.start(job)
        rig.compute(job, range(4))
        rig.sender.first_token(job.id, (7,))
        # The stranger's bytes overtake the right ones under a header that is right in all parts.
        payload = rig.source.block_bytes(stranger.block_id)
        rig.network.deliver(rig.address.url, PREFILL, _header(job, 0), payload)
        await rig.until_ended()
        check_verdict(rig, job, checked)

    run(body())


# ---------------------------------------------------------------- stale blocks


def test_a_header_that_names_an_older_generation_writes_nothing() -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        before = rig.target.content(job.target[1], LAYOUT.block_size)
        stale = replace(job.target[1], generation=job.target[1].generation - 1)
        job.grant = replace(job.grant, handles=(job.target[0], stale, *job.target[2:]))
        rig.hand_over(job)
        await rig.until_ended()
        assert rig.target.content(job.target[1], LAYOUT.block_size) == before
        check_verdict(rig, job, checked=True, cause="stale")
        assert rig.received.units_dropped["stale"] == 1

    run(body())


def test_a_block_that_the_pool_reused_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not happen while the lease holds it; if it does, the pool has the last word."""

    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        before = [bytes(block) for block in rig.target.blocks]
        monkeypatch.setattr(rig.target, "begin_io", lambda _: False)
        rig.hand_over(job)
        await rig.until_ended()
        assert [bytes(block) for block in rig.target.blocks] == before
        check_verdict(rig, job, checked=True, cause="stale")

    run(body())


def test_a_source_block_that_was_reused_is_not_sent() -> None:
    """The request was preempted: its blocks come again, with other handles."""

    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        rig.start(job)
        rig.source.release(job.source[:2])
        rig.compute(job, range(4))
        await quiet()
        assert rig.sent.bytes_sent == (NUM_TOKENS - 8) * LAYOUT.bytes_per_token
        job.source = rig.source.filled(2, seed=9) + job.source[2:]
        rig.compute(job, range(4))
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.identical(job)
        rig.check_balance()

    run(body())


# ---------------------------------------------------------------- lost, late, twice


def test_a_lost_unit_expires_and_frees_everything() -> None:
    async def body() -> None:
        rig = Rig(faults=only(2, copies=0))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        for _ in range(4):  # the sender lives and says so, which must not hold the blocks
            await quiet()
            assert job.lease.state is LeaseState.COMMITTING
            rig.pass_time(TTL / 4)
            rig.sender.renew_leases()
        await rig.until_ended()
        assert job.lease.state is LeaseState.EXPIRED
        assert rig.handoffs[0].cause == "expired"
        assert not rig.identical(job)
        rig.check_balance()

    run(body())


def test_a_late_unit_goes_to_no_block() -> None:
    async def body() -> None:
        rig = Rig(faults=only(2, delay_s=0.02))
        job = rig.reserve(NUM_TOKENS)
        rig.hand_over(job)
        await quiet()
        rig.pass_time(TTL)
        assert job.lease.state is LeaseState.EXPIRED
        reused = rig.target.filled(len(rig.target.free_ids), seed=3)
        before = [bytes(block) for block in rig.target.blocks]
        await rig.until_ended()
        assert rig.received.units_dropped["expired"] == 1
        assert [bytes(block) for block in rig.target.blocks] == before
        rig.target.release(reused)
        rig.check_balance()

    run(body())


@dataclass
class Stuttering(LoopbackSender):
    """Every unit arrives twice, the second time as noise."""

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        super().send(url, to, header, payload, on_done)
        super().send(url, to, header, memoryview(bytes(len(payload))), lambda: None)


def test_duplicates_go_nowhere() -> None:
    async def body() -> None:
        rig = Rig()
        rig.use(Stuttering(rig.network, PREFILL), rig.address)
        job = rig.reserve(NUM_TOKENS)
        rig.start(job)
        rig.compute(job, range(4))
        await until(lambda: rig.received.units_dropped["duplicate"] == 4)
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.identical(job)
        rig.check_balance()

    run(body())


# ---------------------------------------------------------------- landings that take time


def test_a_landing_that_ends_after_its_lease_holds_the_block_until_then() -> None:
    """A matched receive cannot be revoked: the right ends, the memory waits."""

    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        rig.start(job)
        landing = rig.receiver.begin(PREFILL, _header(job, 1))
        assert landing is not None
        rig.receiver.abort(job.id)
        assert rig.target.quarantined == {job.target[1].block_id}
        assert job.target[1].block_id not in rig.target.free_ids
        landing.view[:] = bytes(LAYOUT.block_bytes)
        landing.end(LAYOUT.block_bytes)
        await rig.until_ended()
        assert job.lease.state is LeaseState.REVOKED
        rig.check_balance()

    run(body())


def test_a_partial_unit_that_lands_late_is_not_spread_over_the_block() -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        before = rig.target.content(job.target[LAST], LAYOUT.block_size)
        landing = rig.receiver.begin(PREFILL, _header(job, LAST))
        assert landing is not None
        rig.receiver.abort(job.id)
        landing.view[:] = bytes(len(landing.view))
        landing.end(len(landing.view))
        assert rig.target.content(job.target[LAST], LAYOUT.block_size) == before
        rig.check_balance()

    run(body())


def test_a_landing_that_cannot_be_verified_is_rejected_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(NUM_TOKENS)
        landing = rig.receiver.begin(PREFILL, _header(job, 0))
        assert landing is not None
        monkeypatch.setattr(UnitSealer, "seal", _out_of_memory)
        with pytest.raises(MemoryError):
            landing.end(len(landing.view))
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        rig.check_balance()

    run(body())


def test_each_late_unit_is_told_that_its_lease_is_over() -> None:
    async def body() -> None:
        rig = Rig(loses=lambda message: isinstance(message, LeaseEnded))
        job = rig.reserve(NUM_TOKENS)
        rig.start(job)
        rig.receiver.abort(job.id)  # and the sender does not hear of it
        rig.loses = lambda message: False
        rig.compute(job, [0])
        await rig.until_ended()
        assert rig.handoffs[0].cause == "expired"
        rig.check_balance()

    run(body())


def _out_of_memory(*_: object) -> bytes:
    raise MemoryError


def _header(job: Job, index: int) -> UnitHeader:
    unit = job.lease.units[index]
    return UnitHeader(
        lease=job.lease.number,
        capability=job.lease.capability,
        unit=index,
        handle=job.target[index],
        token_start=unit.token_start,
        token_end=unit.token_end,
        num_bytes=unit_bytes(unit, LAYOUT),
    )


# ---------------------------------------------------------------- all of it at once

deliveries = st.builds(
    Delivery,
    delay_s=st.sampled_from([0.0, 0.0, 0.001, 0.004]),
    copies=st.sampled_from([1, 1, 1, 1, 1, 0, 2]),
    truncate_to=st.sampled_from([None] * 9 + [5]),
    flip_bit=st.sampled_from([None] * 9 + [3]),
    disconnect=st.sampled_from([False] * 12 + [True]),
)


@settings(max_examples=80, deadline=None)
@given(
    faults=st.lists(st.lists(deliveries, min_size=4, max_size=4), min_size=3, max_size=3),
    cached=st.lists(st.sampled_from([0, 4, 12]), min_size=3, max_size=3),
    lost=st.sets(st.integers(0, 30)),
    aborted=st.none() | st.integers(0, 2),
)
def test_whatever_happens_nothing_wrong_commits_and_nothing_is_held(
    faults: list[list[Delivery]], cached: list[int], lost: set[int], aborted: int | None
) -> None:
    async def body() -> None:
        rig = Rig(faults=lambda header: faults[header.lease - 1][header.unit])
        numbers = iter(range(1000))
        rig.loses = lambda message: next(numbers) in lost
        jobs = [
            rig.reserve(NUM_TOKENS, id=AttemptId(f"r{n}", 1), num_cached_tokens=cached[n])
            for n in range(3)
        ]
        for job in jobs:
            rig.hand_over(job)
        if aborted is not None:
            rig.receiver.abort(jobs[aborted].id)
        for _ in range(40):
            await asyncio.sleep(0.0005)
            rig.pass_time(TTL / 15)
        rig.pass_time(1000.0)
        await rig.until_ended()
        assert len(rig.leases) == len(rig.handoffs) == 3
        for job in jobs:
            assert job.lease.state is not LeaseState.COMMITTED or rig.identical(job)
        rig.check_balance()

    run(body())
