"""Which transport new handoffs take when one of them does not work, and when it is tried again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from kvtransfer.choice import _MAX_PEERS, TransportChoice
from kvtransfer.lease import LeaseState
from kvtransfer.transport import TransferStats
from tests.kvtransfer.rig import DECODE, LAYOUT, Rig, until
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.request_messages import Grant
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress


@dataclass
class Scripted:
    """A sender that works as the test says; it only remembers what it was asked."""

    state: str = "works"  # or "elsewhere", "broken"
    asked: list[str] = field(default_factory=list)

    def reaches(self, url: str, to: NodeId) -> bool:
        self.asked.append(url)
        if self.state == "broken":
            raise TransferError("transport", f"{url} is broken")
        return self.state == "works"

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        raise TransferError("transport", f"{url} breaks")

    def close(self) -> None: ...


class Fixture:
    """A fast and a slow transport, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.fast, self.slow = Scripted(), Scripted()
        self.stats = TransferStats()
        senders = {"fast": self.fast, "slow": self.slow}
        self.choice = TransportChoice(senders, self.stats, clock=lambda: self.now)

    def choose(self, *transports: str, decode: NodeId = DECODE) -> str:
        return self.choice.choose(grant(*transports or ("slow", "fast"), decode=decode)).transport


def grant(*transports: str, decode: NodeId = DECODE) -> Grant:
    return Grant(
        lease=1,
        capability=b"c" * 16,
        digest_key=b"d" * 16,
        decode=decode,
        peer_url="peer",
        transports=tuple(TransportAddress(name, f"{name}://{decode.name}") for name in transports),
        layout=LAYOUT,
        handles=(BlockHandle(1, 0, 1),),
        num_cached_tokens=0,
        ttl_s=10.0,
    )


def test_the_order_is_this_nodes() -> None:
    both = Fixture()
    assert both.choose("slow", "fast") == both.choose("fast", "slow") == "fast"
    assert both.choose("slow", "pigeon") == "slow"
    assert not both.stats.transport_failures


def test_nothing_in_common() -> None:
    with pytest.raises(TransferError, match="fast, slow here, pigeon there"):
        Fixture().choose("pigeon")


def test_another_host_is_no_failure() -> None:
    both = Fixture()
    both.fast.state = "elsewhere"
    assert both.choose() == "slow"
    assert not both.stats.transport_failures
    both.fast.state = "works"
    assert both.choose() == "fast"


def test_a_broken_one_is_passed_over_and_tried_again_later() -> None:
    both = Fixture()
    both.fast.state = "broken"
    assert both.choose() == "slow"
    assert both.stats.transport_failures == {"fast": 1}
    both.fast.state = "works"
    both.now += 29.9
    assert both.choose() == "slow"
    assert len(both.fast.asked) == 1
    both.now += 0.1
    assert both.choose() == "fast"
    assert both.stats.transport_failures == {"fast": 1}


def test_it_is_broken_for_one_peer_only() -> None:
    both = Fixture()
    both.fast.state = "broken"
    assert both.choose() == "slow"
    both.fast.state = "works"
    assert both.choose(decode=NodeId("other", 1)) == "fast"


def test_the_only_one_is_always_tried() -> None:
    both = Fixture()
    both.fast.state = "broken"
    for count in (1, 2):
        with pytest.raises(TransferError, match="no common transport"):
            both.choose("fast")
        assert both.stats.transport_failures == {"fast": count}
    both.fast.state = "works"
    assert both.choose("fast") == "fast"


def test_what_fails_last_gives_the_failing_one_another_chance() -> None:
    both = Fixture()
    both.fast.state = "broken"
    assert both.choose() == "slow"
    both.fast.state, both.slow.state = "works", "broken"
    assert both.choose() == "fast"


def test_it_is_said_once_per_peer_and_change(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    both = Fixture()
    for _ in range(3):
        both.choose()
    both.fast.state = "broken"
    both.now += 1
    for _ in range(3):
        both.choose()
    assert [record.getMessage() for record in caplog.records] == [
        f"blocks go to {DECODE} by fast",
        "fast://decode is broken; new handoffs avoid fast",
        f"blocks go to {DECODE} by slow",
    ]


def test_peers_that_come_and_go_are_forgotten() -> None:
    both = Fixture()
    both.fast.state = "broken"
    for number in range(_MAX_PEERS + 10):
        both.choose(decode=NodeId(f"n{number}", number))
    assert len(both.choice._failed) == _MAX_PEERS
    assert len(both.choice._told) <= _MAX_PEERS


def test_a_send_that_fails_ends_one_handoff_and_moves_the_next() -> None:
    async def body() -> None:
        rig = Rig()
        working = rig.address
        senders = {"fast": Scripted(), **rig.sender._pump._transports}
        rig.sender._pump._transports = senders
        rig.sender._choice = TransportChoice(senders, rig.sent, clock=lambda: rig.now)
        rig.address = TransportAddress("fast", "fast://decode")
        first = rig.reserve(9)
        rig.address = working
        second = rig.reserve(9, id=AttemptId("second", 1))
        both = (*first.grant.transports, working)
        for job in (first, second):
            job.grant = replace(job.grant, transports=both)
            rig.hand_over(job)
        await until(lambda: first.lease.live and not second.lease.live)
        rig.receiver.abort(first.id)  # a router that rebinds it may come first
        assert second.lease.state is LeaseState.COMMITTED
        assert rig.identical(second)
        assert rig.sent.transport_failures == {"fast": 1}
        rig.check_balance()

    asyncio.run(body())


def test_a_way_that_is_lost_ends_its_handoffs_and_moves_the_next() -> None:
    """Also one whose units have all left: nobody knows whether they are there."""

    async def body() -> None:
        rig = Rig()
        first = rig.reserve(9)
        rig.hand_over(first)
        rig.sender.lost(TransportAddress("loopback", "elsewhere"), TransferError("transport", "?"))
        assert len(rig.sender) == 1
        assert not rig.sent.transport_failures
        rig.sender.lost(rig.address, TransferError("transport", "it is gone"))
        await rig.until_ended()
        assert [handoff.cause for handoff in rig.handoffs] == ["transport"]
        assert first.lease.state is LeaseState.RELEASED
        assert rig.sent.transport_failures == {"loopback": 1}
        rig.check_balance()

    asyncio.run(body())
