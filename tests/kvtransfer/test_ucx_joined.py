"""Units that travel over UCX in one message: who joins, and what a lease still says to each."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.block_memory import HeldUnit
from kvtransfer.lease import LeaseState
from kvtransfer.ucx_lane import JOINED_BYTES, header_tag, pack_headers, payload_tag
from kvtransfer.ucx_payload import Send, take_payload
from tests.kvtransfer.rig import LAYOUT, PREFILL, Job, Rig, header, nothing, run, until
from tests.kvtransfer.ucx_rig import Hostile, UcxRig
from wire.geometry import Geometry
from wire.handoff_messages import UnitHeader
from wire.types import AttemptId, BlockHandle, NodeId

HALF = LAYOUT.block_bytes // 2
TWO_GROUPS = Geometry(num_layer_groups=2)


def watched(both: UcxRig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units each payload had for which the decode node was asked."""
    seen: list[int] = []
    begin = both.rig.receiver.begin

    def watch(sender: NodeId, message: UnitHeader, num_units: int) -> Any:
        seen.append(num_units)
        return begin(sender, message, num_units)

    monkeypatch.setattr(both.rig.receiver, "begin", watch)
    return seen


def header_of(job: Job, unit: int, /, **other: Any) -> UnitHeader:
    block = unit // 2
    return header(
        lease=job.lease.number,
        capability=job.lease.capability,
        unit=unit,
        handle=job.target[block],
        token_start=4 * block,
        token_end=4 * block + 4,
        **other,
    )


def test_the_layer_groups_of_a_block_travel_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a partial one are gathered, and lie apart."""

    async def body() -> None:
        both = UcxRig(TWO_GROUPS)
        seen = watched(both, monkeypatch)
        await both.hand_over(14)
        assert seen == [2, 2, 2, 1, 1]
        assert both.rig.received.units_received == 8
        both.close()

    run(body())


async def send_headers_then(
    both: UcxRig, hostile: Hostile, payloads: list[tuple[UnitHeader, int]]
) -> None:
    """Returns when the decode node has read them, and waits for the payloads."""
    await hostile.welcomed()
    hostile.send(header_tag(hostile.key), pack_headers(payloads))
    await until(lambda: any(lane._headers for lane in both.receiver._lanes))


def test_a_lease_that_ends_between_header_and_payload_takes_nothing() -> None:
    """The batch spans two leases: the other one takes its units all the same."""

    async def body() -> None:
        both = UcxRig(TWO_GROUPS)
        rig = both.rig
        ended = rig.reserve(8, id=AttemptId("ended", 1))
        lives = rig.reserve(8, id=AttemptId("lives", 1))
        before = [bytes(rig.target.block_bytes(h.block_id)) for h in ended.target]
        hostile = Hostile(both.receiver.address.url)
        heads = [(header_of(job, unit), 2) for unit in (0, 2) for job in (ended, lives)]
        await send_headers_then(both, hostile, heads)
        rig.receiver.abort(ended.id)
        for number in range(4):
            hostile.send(payload_tag(hostile.key), bytes([number + 1]) * 2 * HALF)
        await hostile.close()
        await until(lambda: lives.lease.landed.keys() == {0, 1, 2, 3})
        assert rig.received.units_dropped == {"expired": 2}
        assert [bytes(rig.target.block_bytes(h.block_id)) for h in ended.target] == before
        for number, handle in ((2, lives.target[0]), (4, lives.target[1])):
            assert bytes(rig.target.block_bytes(handle.block_id)) == bytes([number]) * 2 * HALF
        assert not rig.target.touched
        both.close()

    run(body())


@pytest.mark.parametrize(
    ("unit", "num_units"),
    [
        (1, 2),  # into the next block, of other tokens
        (2, 3),  # beyond the last unit
    ],
)
def test_a_payload_of_more_than_a_blocks_units_goes_nowhere(unit: int, num_units: int) -> None:
    async def body() -> None:
        both = UcxRig(TWO_GROUPS)
        rig = both.rig
        job = rig.reserve(8)
        before = [bytes(block) for block in rig.target.blocks]
        hostile = Hostile(both.receiver.address.url)
        await send_headers_then(both, hostile, [(header_of(job, unit), num_units)])
        hostile.send(payload_tag(hostile.key), b"!" * HALF * num_units)
        await hostile.close()
        await until(lambda: rig.received.units_dropped == {"refused": 1})
        assert [bytes(block) for block in rig.target.blocks] == before
        assert job.lease.live
        assert not job.lease.landing
        both.close()

    run(body())


def test_joined_units_of_another_length_end_the_lease() -> None:
    async def body() -> None:
        both = UcxRig(TWO_GROUPS)
        rig = both.rig
        job = rig.reserve(8)
        before = [bytes(block) for block in rig.target.blocks]
        hostile = Hostile(both.receiver.address.url)
        await send_headers_then(both, hostile, [(header_of(job, 0), 2)])
        hostile.send(payload_tag(hostile.key), b"!" * HALF)
        await hostile.close()
        await until(lambda: not job.lease.live)
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        assert [bytes(block) for block in rig.target.blocks] == before
        assert not rig.target.touched
        both.close()

    run(body())


def sends(memory: memoryview, *headers: UnitHeader) -> deque[Send]:
    """One behind the other in `memory`, of equal length."""
    size = len(memory) // len(headers)
    return deque(
        Send(one, memory[i * size : (i + 1) * size], nothing) for i, one in enumerate(headers)
    )


def test_what_is_joined_is_the_memory_of_all() -> None:
    memory = memoryview(bytearray(range(200)))
    payload = take_payload(sends(memory[40:80], *(header(unit=i) for i in range(4))))
    assert payload.header == (header(), 4)
    assert bytes(payload.data.obj) == bytes(range(40, 80))


@pytest.mark.parametrize(
    "second",
    [
        header(unit=2),
        header(unit=1, lease=2),
        header(unit=1, capability=b"d" * 16),
        header(unit=1, handle=BlockHandle(22, 1, 1)),
    ],
)
def test_only_units_that_follow_in_one_block_of_one_lease_are_joined(second: UnitHeader) -> None:
    waiting = sends(memoryview(bytearray(64)), header(), second)
    assert take_payload(waiting).header == (header(), 1)
    assert len(waiting) == 1


def test_what_lies_apart_is_not_joined() -> None:
    memory = memoryview(bytearray(64))
    for there in (memory[33:64], memory[:32], memoryview(bytearray(32))):
        waiting = deque(
            [Send(header(), memory[:32], nothing), Send(header(unit=1), there, nothing)]
        )
        assert take_payload(waiting).num_bytes == 32


def test_a_joined_payload_has_its_limit() -> None:
    memory = memoryview(bytearray(2 * JOINED_BYTES))
    waiting = sends(memory, *(header(unit=i) for i in range(8)))
    assert [len(take_payload(waiting).sends) for _ in range(2)] == [4, 4]


@pytest.mark.parametrize("filled", [False, True])
def test_joined_units_of_a_partial_block_are_spread_over_its_slots(filled: bool) -> None:
    """As where the two ends store numbers differently: what travels is not what is stored."""

    async def body() -> None:
        rig = Rig(geometry=TWO_GROUPS)
        job = rig.reserve(3)
        rig.start(job)
        out = rig.sender._outgoing[job.id]
        blocks = tuple(handle.block_id for handle in job.source)
        held = [HeldUnit(unit, blocks) for unit in job.lease.units.values()]
        parts: list[bytes] = []
        rig.source.read(held, out.dtype, lambda _, data, content: parts.append(bytes(data or b"")))
        landing = rig.receiver.begin(PREFILL, replace(header_of(job, 0), token_end=3), 2)
        assert landing is not None
        data = memoryview(b"".join(parts))
        if filled:
            landing.fill(data)
        else:
            landing.view[:] = data
        landing.end(len(data))
        sealed = [out.sealer.digest(job.lease.units[i], part) for i, part in enumerate(parts)]
        assert job.lease.landed == dict(enumerate(sealed))
        assert rig.identical(job)
        assert not rig.target.touched

    run(body())
