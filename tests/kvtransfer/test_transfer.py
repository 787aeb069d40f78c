"""Sender and receiver together over the loopback transport: the ordinary life and its endings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.handoff import HandoffState
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.loopback import Delivery
from tests.kvtransfer.rig import DECODE, ID, LAYOUT, PREFILL, TTL, Rig, quiet, until
from wire.errors import BatonError, ConfigError, OutboxFull, TransferError
from wire.fleet_messages import Gone
from wire.geometry import Geometry
from wire.handoff_messages import (
    Commit,
    Committed,
    LeaseEnded,
    ReleaseLease,
    UnitHeader,
    UnitsReceived,
)
from wire.layout import KVLayout
from wire.messages import Message
from wire.types import AttemptId, NodeId, TransportAddress

LARGE = KVLayout(num_layers=2, num_kv_heads=4, head_dim=4096, block_size=4, dtype="float32")
CREDIT_BYTES = 4 * LARGE.block_bytes


@pytest.fixture(autouse=True)
def small_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acknowledgements after few blocks."""
    for module in ("handoff", "receiver"):
        monkeypatch.setattr(f"kvtransfer.{module}.CREDIT_BYTES", CREDIT_BYTES)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


# ---------------------------------------------------------------- blocks arrive as they are


@pytest.mark.parametrize("num_layer_groups", [1, 2])
@pytest.mark.parametrize(
    ("num_tokens", "num_cached_tokens"),
    [(1, 0), (3, 0), (4, 0), (5, 0), (8, 0), (33, 0), (9, 4), (9, 8), (16, 12), (8, 8), (40, 36)],
)
def test_blocks_arrive_bit_identical(
    num_tokens: int, num_cached_tokens: int, num_layer_groups: int
) -> None:
    async def body() -> None:
        rig = Rig(geometry=Geometry(num_layer_groups))
        job = rig.reserve(num_tokens, num_cached_tokens=num_cached_tokens)
        size = LAYOUT.block_size
        cached = [rig.target.content(h, size) for h in job.target[: num_cached_tokens // size]]
        empty_slots = rig.target.content(job.target[-1], size)
        rig.hand_over(job)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert job.lease.output_tokens == (7,)
        assert [handoff.state for handoff in rig.handoffs] == [HandoffState.DONE]
        assert rig.identical(job)
        assert cached == [rig.target.content(handle, size) for handle in job.target[: len(cached)]]
        if num_tokens % size:  # slots behind the prompt belong to the decode node
            after = rig.target.content(job.target[-1], size)
            assert after != rig.source.content(job.source[-1], size)
            assert after[-LAYOUT.head_dim * 4 :] == empty_slots[-LAYOUT.head_dim * 4 :]
        moved = (num_tokens - num_cached_tokens) * LAYOUT.bytes_per_token
        assert rig.sent.bytes_sent == rig.received.bytes_received == moved
        rig.check_balance()

    run(body())


def test_the_commit_overtakes_data_that_is_reordered() -> None:
    async def body() -> None:
        rig = Rig(faults=lambda header: Delivery(delay_s=0.02 - 0.001 * header.unit))
        job = rig.reserve(30)
        rig.hand_over(job)
        await quiet()
        assert (job.lease.state,) == (LeaseState.COMMITTING,)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.identical(job)
        rig.check_balance()

    run(body())


def test_many_requests_at_once() -> None:
    async def body() -> None:
        rig = Rig(faults=lambda header: Delivery(delay_s=0.001 * (header.lease % 3)))
        jobs = [rig.reserve(5 + n, id=AttemptId(f"r{n}", 1)) for n in range(8)]
        for job in jobs:
            rig.hand_over(job)
        await rig.until_ended()
        assert all(job.lease.state is LeaseState.COMMITTED for job in jobs)
        assert all(rig.identical(job) for job in jobs)
        rig.check_balance()

    run(body())


@pytest.mark.parametrize("window_bytes", [0, LARGE.block_bytes * 3 // 2, CREDIT_BYTES * 2])
@pytest.mark.parametrize("num_blocks", [3, 4, 17])
def test_a_small_window_slows_and_never_stops(window_bytes: int, num_blocks: int) -> None:
    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=window_bytes)
        job = rig.reserve(LARGE.block_size * num_blocks)
        rig.hand_over(job)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.identical(job)
        acknowledged = [m.num_bytes for m in rig.heard_by_prefill if isinstance(m, UnitsReceived)]
        assert acknowledged == sorted(acknowledged)
        assert all(told <= rig.received.bytes_received for told in acknowledged)
        rig.check_balance()

    run(body())


def test_a_lost_acknowledgement_is_made_up_for_by_the_next() -> None:
    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=CREDIT_BYTES * 2)
        losses = iter([True, True])
        rig.loses = lambda message: isinstance(message, UnitsReceived) and next(losses, False)
        job = rig.reserve(LARGE.block_size * 20)
        rig.hand_over(job)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        acknowledged = [m.num_bytes for m in rig.heard_by_prefill if isinstance(m, UnitsReceived)]
        assert acknowledged[0] > CREDIT_BYTES
        rig.check_balance()

    run(body())


def test_acknowledgements_that_are_lost_on_the_way_are_healed_by_the_heartbeat() -> None:
    """They were sent, so nobody knows; the window is closed, so nothing more arrives."""

    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=0)
        send = rig.receiver._send
        rig.receiver._send = lambda to, message: None
        job = rig.reserve(LARGE.block_size * 20)
        rig.hand_over(job)
        await quiet()
        rig.receiver._send = send
        rig.pass_time(0.1)
        await quiet()
        assert job.lease.live, "nothing has opened the window"
        rig.sender.renew_leases()
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.identical(job)
        rig.check_balance()

    run(body())


def test_an_acknowledgement_is_said_later_if_nothing_more_arrives() -> None:
    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=0)
        rig.loses = lambda message: isinstance(message, UnitsReceived)
        job = rig.reserve(LARGE.block_size * 20)
        rig.hand_over(job)
        await quiet()
        rig.loses = lambda message: False
        await until(lambda: not rig.target.touched)
        assert job.lease.live
        rig.pass_time(0.1)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        rig.check_balance()

    run(body())


# ---------------------------------------------------------------- messages get lost


@pytest.mark.parametrize("lost", [Commit, Committed])
def test_an_unanswered_commit_is_asked_again(lost: type[Message]) -> None:
    async def body() -> None:
        rig = Rig(loses=lambda message: isinstance(message, lost))
        job = rig.reserve(9)
        rig.hand_over(job)
        await quiet()
        assert len(rig.sender) == 1
        rig.loses = lambda message: False
        rig.pass_time(1.0)
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert rig.handoffs[0].state is HandoffState.DONE
        assert rig.leases == [job.lease]
        rig.check_balance()

    run(body())


@pytest.mark.parametrize("error", [OutboxFull("full"), ConfigError("no such address")])
def test_silence_ends_at_the_deadline_and_not_before(error: BatonError) -> None:
    async def body() -> None:
        rig = Rig(loses=lambda message: True, loss=error)
        job = rig.reserve(9)
        rig.hand_over(job)
        for _ in range(9):
            await quiet()
            rig.pass_time(TTL)
            rig.sender.renew_leases()
        assert len(rig.sender) == 1
        rig.pass_time(TTL)
        await rig.until_ended()
        assert rig.handoffs[0].cause == "expired"
        rig.check_balance()

    run(body())


def test_heartbeats_keep_a_waiting_request_and_its_loss_ends_it() -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(9)
        rig.start(job)
        rig.compute(job, [0])
        for _ in range(5):
            await quiet()
            rig.pass_time(TTL * 0.6)
            rig.sender.renew_leases()
        await quiet()
        assert job.lease.live
        rig.pass_time(TTL)
        await rig.until_ended()
        assert job.lease.state is LeaseState.EXPIRED
        assert rig.handoffs[0].cause == "expired"
        rig.check_balance()

    run(body())


# ---------------------------------------------------------------- endings


@pytest.mark.parametrize("stage", range(6))
def test_the_prefill_node_may_give_up_at_any_point(stage: int) -> None:
    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=0, faults=lambda _: Delivery(delay_s=0.003))
        rig.loses = lambda message: isinstance(message, Commit) and stage < 5
        job = rig.reserve(LARGE.block_size * 8)
        steps: list[Callable[[], None]] = [
            lambda: rig.start(job),
            lambda: rig.compute(job, range(2)),
            lambda: rig.compute(job, range(2, 8)),  # most of it waits for the window
            lambda: rig.sender.first_token(job.id, (7,)),
        ]
        for step in steps[: stage + 1]:
            step()
        await quiet()
        rig.sender.abort(job.id, "revoked")
        rig.sender.abort(job.id, "revoked")
        assert len(rig.sender) == 0
        rig.sender.blocks_finished(job.id, [(0, job.source[0])])  # the engine did not know yet
        rig.sender.first_token(job.id, (7,))
        rig.source.release(job.source)  # the request lets go of its blocks at once
        await rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.RELEASED, "revoked")
        assert [(h.state, h.cause) for h in rig.handoffs] == [(HandoffState.ABORTED, "revoked")]
        assert len(rig.source.free_ids) == len(rig.source.generations)
        rig.check_balance()

    run(body())


def test_a_dead_decode_node_ends_its_handoffs_only() -> None:
    async def body() -> None:
        rig = Rig(loses=lambda message: True)
        job, other = rig.reserve(9), rig.reserve(9, id=AttemptId("other", 1))
        other.grant = replace(other.grant, decode=NodeId("elsewhere", 5))
        rig.hand_over(job)
        rig.hand_over(other)
        rig.sender.handle(NodeId("decode", 3), Gone(DECODE))  # its successor says so
        assert [(h.id, h.cause) for h in rig.handoffs] == [(ID, "gone")]
        assert len(rig.sender) == 1
        rig.sender.abort(other.id, "cancelled")
        rig.now += TTL
        rig.receiver.tick()
        await rig.until_ended()
        rig.check_balance()

    run(body())


def test_a_prefill_node_with_a_new_life_soon_loses_the_leases_of_the_one_before() -> None:
    async def body() -> None:
        rig = Rig(faults=lambda _: Delivery(copies=0))
        job = rig.reserve(9)
        rig.hand_over(job)
        other = rig.reserve(9, id=AttemptId("other", 1), sender=NodeId(PREFILL.name, 2))
        rig.now += TTL / 4
        rig.receiver.tick()
        rig.receiver.abort(other.id)
        await rig.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.EXPIRED, "expired")
        rig.check_balance()

    run(body())


@pytest.mark.parametrize("aborted_by", ["router", "higher attempt"])
def test_a_revoked_lease_stops_the_sender(aborted_by: str) -> None:
    async def body() -> None:
        rig = Rig(faults=lambda _: Delivery(delay_s=0.005))
        job = rig.reserve(20)
        rig.start(job)
        rig.compute(job, range(3))
        if aborted_by == "router":
            rig.receiver.abort(job.id)
        else:
            second = rig.reserve(20, id=AttemptId(ID.request, 2))
            rig.receiver.abort(second.id)
            rig.source.release(second.source)
        await rig.until_ended()
        cause = "revoked" if aborted_by == "router" else "superseded"
        assert (job.lease.state, job.lease.cause) == (LeaseState.REVOKED, cause)
        assert rig.handoffs[0].cause == cause
        rig.check_balance()

    run(body())


def test_a_failed_send_leaves_the_lease_to_be_rebound() -> None:
    async def body() -> None:
        rig = Rig(faults=lambda header: Delivery(disconnect=header.unit == 2))
        job = rig.reserve(20)
        rig.start(job)
        rig.compute(job, range(5))
        await until(lambda: rig.handoffs)
        assert rig.handoffs[0].cause == "transport"
        assert job.lease.live
        again = rig.reserve(20, id=AttemptId(job.id.request, job.id.attempt + 1), rebinds=True)
        assert (job.lease.state, job.lease.cause) == (LeaseState.REVOKED, "rebound")
        assert len(again.lease.units) == len(job.lease.units), "all are sent again"
        rig.receiver.abort(again.id)
        await rig.until_ended()
        rig.check_balance()

    run(body())


def test_a_release_of_somebody_elses_lease_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(9)
        lie = ReleaseLease(job.id, job.lease.number, b"x" * 16, "drained")
        rig.receiver.handle(NodeId("stranger", 1), lie)
        assert job.lease.live
        rig.receiver.abort(job.id)
        rig.check_balance()

    run(body())
    assert "cannot release" in caplog.text


# ---------------------------------------------------------------- hostile or hasty peers


def test_a_committed_that_comes_too_early_is_not_believed() -> None:
    async def body() -> None:
        rig = Rig(layout=LARGE, window_bytes=0, faults=lambda _: Delivery(delay_s=0.002))
        job = rig.reserve(LARGE.block_size * 8)
        rig.start(job)
        rig.compute(job, range(8))
        rig.sender.handle(DECODE, Committed(job.id, job.lease.number))
        assert len(rig.sender) == 1
        rig.sender.first_token(job.id, (7,))
        await rig.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        rig.check_balance()

    run(body())


def test_messages_of_other_nodes_touch_no_handoff() -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(9)
        rig.start(job)
        for sender in (NodeId("stranger", 2), NodeId(DECODE.name, 99)):
            rig.sender.handle(sender, LeaseEnded(job.id, job.lease.number, "revoked"))
            rig.sender.handle(sender, Committed(job.id, job.lease.number))
        rig.sender.handle(DECODE, LeaseEnded(job.id, 99, "revoked"))
        assert len(rig.sender) == 1
        rig.sender.abort(job.id, "cancelled")
        await rig.until_ended()
        rig.check_balance()

    run(body())


def test_a_late_units_answer_does_not_overrule_the_commits() -> None:
    """A duplicate that arrives after the commit finds no lease; if Committed was lost as well, the
    sender must still learn that the decode node owns the request."""

    async def body() -> None:
        rig = Rig(loses=lambda message: isinstance(message, Committed))
        job = rig.reserve(9)
        headers: list[UnitHeader] = []

        def overheard(header: UnitHeader) -> Delivery:
            headers.append(header)
            return Delivery()

        rig.network.faults = overheard
        rig.hand_over(job)
        await quiet()
        assert rig.receiver.begin(PREFILL, headers[0]) is None
        await quiet()
        assert len(rig.sender) == 1
        rig.loses = lambda message: False
        rig.pass_time(1.0)
        await rig.until_ended()
        assert rig.handoffs[0].state is HandoffState.DONE
        rig.check_balance()

    run(body())


def test_grants_that_do_not_fit_are_refused() -> None:
    async def body() -> None:
        rig = Rig()
        job = rig.reserve(9)
        other_layout = replace(LAYOUT, num_layers=3)
        elsewhere = (TransportAddress("pigeon", "roof"),)
        for cause, grant in [
            ("layout", replace(job.grant, layout=other_layout)),
            ("refused", replace(job.grant, handles=job.target[:-1])),
            ("refused", replace(job.grant, num_cached_tokens=5)),
            ("refused", replace(job.grant, geometry=Geometry(LAYOUT.num_layers + 1))),
            ("transport", replace(job.grant, transports=elsewhere)),
        ]:
            with pytest.raises(TransferError) as caught:
                rig.sender.start(job.id, grant, tokens=job.tokens, cache_salt="", deadline_s=1.0)
            assert caught.value.cause == cause
        assert len(rig.sender) == 0
        rig.start(job)
        with pytest.raises(AssertionError, match="already"):
            rig.start(job)
        rig.sender.abort(job.id, "cancelled")
        await rig.until_ended()

    run(body())


def test_an_owner_that_fails_keeps_no_other_from_hearing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        rig = Rig()
        jobs = [rig.reserve(9, id=AttemptId(f"r{n}", 1)) for n in range(3)]
        for job in jobs:
            rig.start(job)
        own = rig.receiver._on_ended

        def fail_once(lease: Lease) -> None:
            own(lease)
            if lease is jobs[0].lease:
                raise ValueError("a bug")

        monkeypatch.setattr(rig.receiver, "_on_ended", fail_once)
        rig.now += TTL
        rig.receiver.tick()
        assert rig.leases == [job.lease for job in jobs]
        await rig.until_ended()  # the sender heard of all three
        rig.check_balance()

    run(body())
    assert "was not handled" in caplog.text
