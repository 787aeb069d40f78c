"""The prefill side's machine: states, window, and the commit that is asked again."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtransfer.handoff import CREDIT_BYTES, MAX_ASK_S, Handoff, HandoffState
from kvtransfer.units import units_of
from wire.handoff_messages import Commit
from wire.layout import KVLayout
from wire.request_messages import Grant
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress

ID = AttemptId("r", 1)


def layout_of(block_bytes: int) -> KVLayout:
    """A layout whose blocks of 4 tokens have about this size."""
    return KVLayout(1, 1, max(1, block_bytes // 32), 4, "float32")


def handoff(
    num_tokens: int = 11,
    *,
    num_cached_tokens: int = 0,
    window_bytes: int = 1 << 30,
    block_bytes: int = 32,
) -> Handoff:
    layout = layout_of(block_bytes)
    handles = tuple(BlockHandle(1, n, 50 + n) for n in range(layout.num_blocks(num_tokens)))
    grant = Grant(
        lease=3,
        capability=b"c" * 16,
        digest_key=b"k" * 16,
        decode=NodeId("decode", 2),
        peer_url="peer",
        transports=(TransportAddress("loopback", "here"),),
        layout=layout,
        handles=handles,
        num_cached_tokens=num_cached_tokens,
        ttl_s=10.0,
    )
    units = units_of(num_tokens, num_cached_tokens, layout)
    return Handoff(ID, grant, units=units, window_bytes=window_bytes, deadline=99.0)


def state(machine: Handoff) -> HandoffState:
    return machine.state


def offer(machine: Handoff, index: int) -> None:
    machine.offer(index, (BlockHandle(8, index, 1),), bytes([index]) * 16)


def send_all(machine: Handoff) -> list[int]:
    sent = []
    while (ready := machine.next_send()) is not None:
        sent.append(ready[0].unit)
    return sent


def commit(machine: Handoff, now: float) -> Commit:
    message = machine.next_commit(now)
    assert message is not None
    return message


def test_the_way_to_done() -> None:
    machine = handoff()
    assert state(machine) is HandoffState.COMPUTING
    assert machine.next_commit(0.0) is None
    offer(machine, 1)
    offer(machine, 0)
    assert send_all(machine) == [1, 0]
    offer(machine, 2)
    machine.finish((7, 8))
    assert state(machine) is HandoffState.SENDING
    message = commit(machine, 0.0)  # overtakes the last unit
    assert send_all(machine) == [2]
    assert state(machine) is HandoffState.AWAITING_COMMIT
    machine.committed()
    assert state(machine) is HandoffState.DONE
    assert message.output_tokens == (7, 8)
    assert [(x.unit, x.token_start, x.token_end) for x in message.units] == [
        (0, 0, 4),
        (1, 4, 8),
        (2, 8, 11),
    ]
    assert machine.abort("late") == []
    assert state(machine) is HandoffState.DONE


def test_a_header_names_what_the_grant_named() -> None:
    machine = handoff(num_tokens=6)
    offer(machine, 1)
    sent = machine.next_send()
    assert sent is not None
    header, ready = sent
    assert ready.sources == (BlockHandle(8, 1, 1),)
    assert (header.lease, header.capability, header.handle) == (
        3,
        b"c" * 16,
        BlockHandle(1, 1, 51),
    )
    assert (header.token_start, header.token_end) == (4, 6)
    assert header.num_bytes == 2 * machine.grant.layout.bytes_per_token == machine.bytes_sent


def test_only_what_the_receiver_lacks_is_wanted_and_once() -> None:
    machine = handoff(num_cached_tokens=8)
    assert [machine.wants(index) for index in range(5)] == [False, False, True, False, False]
    offer(machine, 2)
    assert not machine.wants(2)
    with pytest.raises(AssertionError):
        offer(machine, 2)


def test_all_cached_goes_straight_to_the_commit() -> None:
    machine = handoff(8, num_cached_tokens=8)
    machine.finish((7,))
    assert state(machine) is HandoffState.AWAITING_COMMIT
    assert commit(machine, 0.0).units == ()


def test_the_first_token_needs_every_unit() -> None:
    machine = handoff()
    offer(machine, 0)
    with pytest.raises(AssertionError, match="missing"):
        machine.finish((7,))


def test_the_commit_is_asked_again_ever_more_rarely() -> None:
    machine = handoff(4)
    offer(machine, 0)
    machine.finish((7,))
    send_all(machine)
    asked = [n / 10 for n in range(1000) if machine.next_commit(n / 10) is not None]
    gaps = [round(later - earlier, 3) for earlier, later in pairwise(asked)]
    assert asked[:2] == [0.0, 0.5]
    assert gaps == sorted(gaps)
    assert max(gaps) <= MAX_ASK_S + 0.2
    assert len(asked) < 20
    machine.committed()
    assert machine.next_commit(1e9) is None


def test_every_commit_is_the_same() -> None:
    machine = handoff()
    for index in range(3):
        offer(machine, index)
    machine.finish((7,))
    assert commit(machine, 0.0) == commit(machine, 100.0)


def test_abort_returns_what_was_not_sent_and_sends_no_more() -> None:
    machine = handoff(window_bytes=0, block_bytes=CREDIT_BYTES)
    for index in range(3):
        offer(machine, index)
    assert send_all(machine) == [0]
    assert [ready.unit.index for ready in machine.abort("cancelled")] == [1, 2]
    assert (state(machine), machine.cause) == (HandoffState.ABORTED, "cancelled")
    assert machine.abort("again") == []
    assert machine.cause == "cancelled"
    machine.acknowledged(1 << 30)
    assert send_all(machine) == []
    assert not machine.wants(1)


@pytest.mark.parametrize("finished", [False, True])
def test_nobody_can_have_committed_before_all_units_left(finished: bool) -> None:
    """A peer that says so is wrong; believing it would forget the blocks that still wait."""
    machine = handoff(window_bytes=0, block_bytes=CREDIT_BYTES)
    for index in range(3):
        offer(machine, index)
    if finished:
        machine.finish((7,))
    send_all(machine)
    machine.committed()
    assert not machine.ended
    assert len(machine.abort("cancelled")) == 2


# Units far below, around and far beyond both the window and what the receiver withholds.
@given(
    window=st.integers(0, 4 * CREDIT_BYTES),
    block_bytes=st.sampled_from([32, 1000, CREDIT_BYTES // 3, CREDIT_BYTES, 3 * CREDIT_BYTES]),
    num_units=st.integers(1, 12),
)
def test_the_window_is_never_stuck_and_rarely_exceeded(
    window: int, block_bytes: int, num_units: int
) -> None:
    """The receiver withholds acknowledgements below CREDIT_BYTES; the sender must go on."""
    machine = handoff(4 * num_units, window_bytes=window, block_bytes=block_bytes)
    size = 4 * machine.grant.layout.bytes_per_token
    for index in range(num_units):
        offer(machine, index)
    on_the_way: deque[int] = deque()
    withheld = taken = sent = 0
    while sent < num_units:
        new = send_all(machine)
        sent += len(new)
        on_the_way.extend(new)
        unacknowledged = len(on_the_way) * size + withheld
        assert unacknowledged <= max(window, CREDIT_BYTES + size)
        assert on_the_way or sent == num_units, "stuck: nothing is on the way"
        on_the_way.popleft()
        withheld += size
        if withheld >= CREDIT_BYTES:
            taken += withheld
            machine.acknowledged(taken)
            withheld = 0


def test_a_peer_that_acknowledges_too_much_gains_nothing() -> None:
    machine = handoff(100, window_bytes=0, block_bytes=CREDIT_BYTES)
    for index in range(5):
        offer(machine, index)
    send_all(machine)
    machine.acknowledged(1 << 60)
    assert send_all(machine) == [1]
