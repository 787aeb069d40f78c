"""Messages over UCX that do not belong, and handlers that fail."""

from __future__ import annotations

from typing import Any

import pytest

from kvtransfer.ucx_lane import (
    HELLO_TAG,
    MAGIC,
    MAX_JOINED,
    header_tag,
    pack_headers,
    pack_hello,
    payload_tag,
)
from tests.kvtransfer.rig import DECODE as RIG_DECODE
from tests.kvtransfer.rig import LAYOUT, header, run, until
from tests.kvtransfer.ucx_peer import PREFILL
from tests.kvtransfer.ucx_rig import Hostile, UcxRig
from wire.handoff_messages import UnitHeader
from wire.types import NodeId


def test_messages_of_every_kind_are_counted_and_leave_the_next_unit_alone() -> None:
    async def body() -> None:
        both = UcxRig()
        hostile = Hostile(both.receiver.address.url)
        await hostile.welcomed()
        head = pack_headers([(header(), 1)])
        first, second = header_tag(hostile.key), payload_tag(hostile.key)
        for tag, data in (
            (second, b"a payload alone"),  # malformed
            (first, b"noise"),  # malformed
            (second, b"its payload"),
            (first, head),
            (first, bytes(1 << 20)),  # malformed twice: no payload before it, and too large
            (second, b"its payload"),
            (first, head + b"x"),  # malformed
            (second, b"its payload"),
            (first, pack_headers([(header(token_end=1 << 31), 1)])),  # malformed
            (second, b"its payload"),
            (first, pack_headers([(header(), 0)])),  # malformed
            (second, b"its payload"),
            (first, pack_headers([(header(), 1), (header(), MAX_JOINED + 1)])),  # malformed
            (second, b"its payload"),
            (first, head + head),  # expired twice
            (second, bytes(1 << 20)),
            (second, bytes(4 << 20)),
            (12345, b"no lane's"),
            (1 << 63, bytes(1 << 20)),
        ):
            hostile.send(tag, data)
        await hostile.close()
        assert both.rig.received.units_dropped == {"malformed": 8, "expired": 2}
        await both.hand_over(30)
        both.close()

    run(body())


def test_a_hello_for_another_life_gets_no_lane() -> None:
    async def body() -> None:
        both = UcxRig()
        hostile = Hostile(both.receiver.address.url)
        other_life = NodeId(RIG_DECODE.name, 9)
        way_back = hostile.driver.address
        hostile.send(HELLO_TAG, pack_hello(PREFILL, other_life, hostile.password, way_back))
        await hostile.close()
        await until(lambda: both.rig.received.units_dropped == {"stale": 1})
        assert not both.receiver._lanes
        both.close()

    run(body())


@pytest.mark.parametrize("length", [1, LAYOUT.block_bytes - 1, LAYOUT.block_bytes + 1, 1 << 20])
def test_a_payload_of_another_length_is_rejected(length: int) -> None:
    async def body() -> None:
        both = UcxRig()
        assert not await both.rig.check_rejected(both.sender, memoryview(bytes(length)))
        await both.hand_over(30)
        both.close()

    run(body())


def test_a_refused_unit_goes_nowhere() -> None:
    """Its lease has ended: of a large unit not even the bytes travel, and the sender is let go."""

    async def body() -> None:
        both = UcxRig()
        job = both.rig.reserve(4)
        both.rig.receiver.abort(job.id)
        before = [bytes(block) for block in both.rig.target.blocks]
        done: list[int] = []
        for length in (LAYOUT.block_bytes, 4 << 20):
            unit = header(capability=job.lease.capability, handle=job.target[0])
            payload = memoryview(bytes(length))
            both.sender.send(
                both.receiver.address.url, RIG_DECODE, unit, payload, lambda: done.append(1)
            )
        await until(lambda: len(done) == 2 and both.rig.received.units_dropped["expired"] == 2)
        assert [bytes(block) for block in both.rig.target.blocks] == before
        both.close()

    run(body())


def test_handlers_that_fail_stop_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        both = UcxRig()
        begin, failures = both.rig.receiver.begin, iter([True])

        def fail_once(sender: NodeId, message: UnitHeader, num_units: int) -> Any:
            if next(failures, False):
                raise ValueError("a bug")
            return begin(sender, message, num_units)

        def fail() -> None:
            raise ValueError("another bug")

        monkeypatch.setattr(both.rig.receiver, "begin", fail_once)
        both.sender.send(
            both.receiver.address.url, RIG_DECODE, header(), memoryview(b"12345678"), fail
        )
        await until(lambda: len(caplog.records) == 2)
        await both.hand_over(30)
        both.close()

    run(body())
    messages = {record.message for record in caplog.records}
    assert messages == {"a message handler failed", "the end of a send was not handled"}


@pytest.mark.parametrize(
    ("tag", "begin"),
    [
        (HELLO_TAG, b""),
        (HELLO_TAG, MAGIC),
        (HELLO_TAG, MAGIC + bytes(16)),
        (7, b""),
        (1 << 63, b""),
    ],
)
def test_who_does_not_know_the_pass_gets_no_lane(tag: int, begin: bytes) -> None:
    """What follows would end this process, if UCX read it as an address."""

    async def body() -> None:
        both = UcxRig()
        hostile = Hostile(both.receiver.address.url)
        for length in (1, 60, 1 << 20):
            hostile.send(tag, begin + b"\xff" * length)
        await hostile.close()
        await until(lambda: both.rig.received.units_dropped["malformed"] == 3)
        assert not both.receiver._lanes
        await both.hand_over(30)
        both.close()

    run(body())


def test_a_good_hello_with_another_pass_gets_no_lane() -> None:
    async def body() -> None:
        both = UcxRig()
        hostile = Hostile(both.receiver.address.url)
        hello = pack_hello(PREFILL, RIG_DECODE, bytes(16), hostile.driver.address)
        hostile.send(HELLO_TAG, hello)
        await hostile.close()
        await until(lambda: both.rig.received.units_dropped["malformed"])
        assert not both.receiver._lanes
        both.close()

    run(body())
