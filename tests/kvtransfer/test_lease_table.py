"""Every transition of a lease, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.outcomes import Outcome
from kvtransfer.units import Unit
from tests.kvtransfer.pool import unit_of
from wire.errors import TransferError
from wire.handoff_messages import Commit, LeaseClaim, UnitHeader, UnitSeal
from wire.types import AttemptId, BlockHandle, NodeId

SENDER = NodeId("prefill", 1)
STRANGER = NodeId("prefill", 2)  # the same name in another life
OTHER = NodeId("other", 1)
CAPABILITY = b"c" * 16
TTL = 10.0
FIRST = AttemptId("r", 1)
SECOND = AttemptId("r", 2)


def digest(index: int) -> bytes:
    return bytes([index]) * 16


def state(lease: Lease) -> LeaseState:
    return lease.state


def granted(
    table: LeaseTable,
    id: AttemptId = FIRST,
    *,
    num_units: int = 2,
    now: float = 0.0,
    deadline_s: float = 100.0,
) -> Lease:
    return table.grant(
        id,
        sender=SENDER,
        units=[unit_of(index) for index in range(num_units)],
        handles=tuple(BlockHandle(9, 100 + index, 5) for index in range(num_units)),
        capability=CAPABILITY,
        digest_key=b"k" * 16,
        now=now,
        deadline_s=deadline_s,
    )


def header(lease: Lease, index: int, /, **other: Any) -> UnitHeader:
    values: dict[str, Any] = {
        "lease": lease.number,
        "capability": CAPABILITY,
        "unit": index,
        "handle": BlockHandle(9, 100 + index, 5),
        "token_start": index * 4,
        "token_end": index * 4 + 4,
        "num_bytes": 64,
    }
    return UnitHeader(**values | other)


def land(table: LeaseTable, lease: Lease, *indices: int, now: float = 0.0) -> None:
    for index in indices:
        table.begin_unit(header(lease, index), SENDER, now)
        table.end_unit(lease, index, digest(index), now)


def in_pieces(table: LeaseTable) -> Lease:
    """A lease on one block, cut into three layers."""
    return table.grant(
        FIRST,
        sender=SENDER,
        units=[Unit(index, 0, 0, 4, index, index + 1, 0, 1) for index in range(3)],
        handles=(BlockHandle(9, 100, 5),),
        capability=CAPABILITY,
        digest_key=b"k" * 16,
        now=0.0,
        deadline_s=100.0,
    )


def test_of_several_units_all_may_be_written_or_none() -> None:
    table = LeaseTable(ttl_s=TTL)
    lease = in_pieces(table)
    head = header(lease, 0)
    table.begin_unit(replace(head, unit=1), SENDER, 0.0)
    with pytest.raises(TransferError) as caught:
        table.begin_unit(head, SENDER, 0.0, 2)
    assert caught.value.cause == "duplicate"
    with pytest.raises(TransferError) as caught:
        table.begin_unit(replace(head, unit=2), SENDER, 0.0, 2)
    assert caught.value.cause == "refused"
    assert lease.landing == {1}
    assert lease.live


def test_several_units_of_which_one_did_not_land_end_the_lease() -> None:
    table = LeaseTable(ttl_s=TTL)
    lease = in_pieces(table)
    table.begin_unit(header(lease, 0), SENDER, 0.0, 3)
    assert lease.landing == {0, 1, 2}
    table.end_units(lease, {0: digest(0), 1: None, 2: digest(2)}, 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "transport")
    assert not lease.landing
    assert not lease.landed


def commit_of(lease: Lease, /, **other: Any) -> Commit:
    units = tuple(UnitSeal(i, i * 4, i * 4 + 4, digest(i)) for i in lease.units)
    values: dict[str, Any] = {
        "id": lease.id,
        "lease": lease.number,
        "capability": CAPABILITY,
        "units": units,
        "output_tokens": (5,),
    }
    return Commit(**values | other)


def refusal(table: LeaseTable, message: Commit, sender: NodeId = SENDER, now: float = 0.0) -> str:
    with pytest.raises(TransferError) as caught:
        table.commit(message, sender, now)
    return caught.value.cause


def unit_refusal(
    table: LeaseTable, message: UnitHeader, sender: NodeId = SENDER, now: float = 0.0
) -> str:
    with pytest.raises(TransferError) as caught:
        table.begin_unit(message, sender, now)
    return caught.value.cause


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(ttl_s=TTL)


# ---------------------------------------------------------------- the way to COMMITTED


def test_data_then_commit(table: LeaseTable) -> None:
    lease = granted(table)
    assert table.find(FIRST) is lease
    land(table, lease, 0)
    assert state(lease) is LeaseState.RECEIVING
    land(table, lease, 1)
    assert state(lease) is LeaseState.RECEIVING  # the data alone commits nothing
    assert table.commit(commit_of(lease), SENDER, 0.0) is lease
    assert state(lease) is LeaseState.COMMITTED
    assert lease.output_tokens == (5,)
    assert table.take_ended() == [lease]
    assert table.take_ended() == []
    assert len(table) == 0
    assert table.find(FIRST) is None


def test_commit_overtakes_the_data(table: LeaseTable) -> None:
    lease = granted(table)
    assert table.commit(commit_of(lease), SENDER, 0.0) is lease
    assert state(lease) is LeaseState.COMMITTING
    land(table, lease, 1)
    assert state(lease) is LeaseState.COMMITTING
    land(table, lease, 0)
    assert state(lease) is LeaseState.COMMITTED


def test_nothing_commits_while_a_unit_is_being_written(table: LeaseTable) -> None:
    lease = granted(table)
    land(table, lease, 0)
    table.begin_unit(header(lease, 1), SENDER, 0.0)
    table.commit(commit_of(lease), SENDER, 0.0)
    assert state(lease) is LeaseState.COMMITTING
    table.end_unit(lease, 1, digest(1), 0.0)
    assert state(lease) is LeaseState.COMMITTED


def test_a_prompt_that_is_all_cached_needs_the_commit_only(table: LeaseTable) -> None:
    lease = granted(table, num_units=0)
    table.commit(commit_of(lease), SENDER, 0.0)
    assert state(lease) is LeaseState.COMMITTED


def test_a_commit_asked_again_is_answered_the_same(table: LeaseTable) -> None:
    lease = granted(table)
    message = commit_of(lease)
    table.commit(message, SENDER, 0.0)
    assert table.commit(message, SENDER, 1.0) is lease
    land(table, lease, 0, 1, now=1.0)
    answers = [table.commit(message, SENDER, 2.0 + again) for again in range(3)]
    assert answers == [Outcome(1, lease.number, True, "", 1.0)] * 3
    assert table.take_ended() == [lease]


# ---------------------------------------------------------------- contradictions


@pytest.mark.parametrize("early", [True, False])
def test_a_wrong_digest_rejects_at_once(table: LeaseTable, early: bool) -> None:
    lease = granted(table)
    if early:
        table.commit(commit_of(lease), SENDER, 0.0)
    table.begin_unit(header(lease, 0), SENDER, 0.0)
    table.end_unit(lease, 0, b"x" * 16, 0.0)
    if not early:
        assert lease.live  # nobody has said yet what it should be
        table.commit(commit_of(lease), SENDER, 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "digest")
    answer = table.commit(commit_of(lease), SENDER, 0.0)
    assert isinstance(answer, Outcome)
    assert not answer.committed


@pytest.mark.parametrize(
    "units",
    [
        (),
        (UnitSeal(0, 0, 4, digest(0)),),
        (UnitSeal(0, 0, 4, digest(0)), UnitSeal(1, 4, 7, digest(1))),
        (UnitSeal(0, 0, 4, digest(0)), UnitSeal(2, 4, 8, digest(1))),
        tuple(UnitSeal(i, i * 4, i * 4 + 4, digest(i)) for i in range(3)),
    ],
    ids=["empty", "too few", "another range", "another index", "too many"],
)
def test_a_manifest_that_names_other_units_rejects(
    table: LeaseTable, units: tuple[UnitSeal, ...]
) -> None:
    lease = granted(table)
    land(table, lease, 0, 1)
    table.commit(commit_of(lease, units=units), SENDER, 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "manifest")


@pytest.mark.parametrize("field", ["units", "output_tokens"])
def test_two_commits_that_differ_reject(table: LeaseTable, field: str) -> None:
    lease = granted(table)
    message = commit_of(lease)
    table.commit(message, SENDER, 0.0)
    other = (*message.units[:1], UnitSeal(1, 4, 8, b"x" * 16)) if field == "units" else (6,)
    table.commit(commit_of(lease, **{field: other}), SENDER, 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "manifest")


def test_a_unit_cut_short_rejects(table: LeaseTable) -> None:
    lease = granted(table)
    table.begin_unit(header(lease, 0), SENDER, 0.0)
    table.end_unit(lease, 0, None, 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "transport")


def test_another_generation_rejects(table: LeaseTable) -> None:
    lease = granted(table)
    stale = header(lease, 0, handle=BlockHandle(9, 100, 4))
    assert unit_refusal(table, stale) == "stale"
    assert (lease.state, lease.cause) == (LeaseState.REJECTED, "stale")


# ---------------------------------------------------------------- what goes nowhere


def test_units_of_others_change_nothing(table: LeaseTable) -> None:
    lease = granted(table)
    assert unit_refusal(table, header(lease, 0), STRANGER) == "refused"
    assert unit_refusal(table, header(lease, 0, capability=b"x" * 16)) == "refused"
    assert unit_refusal(table, header(lease, 0, capability=b"x" * 32)) == "refused"
    assert unit_refusal(table, header(lease, 7)) == "refused"
    assert unit_refusal(table, header(lease, 0, token_end=3)) == "refused"
    assert unit_refusal(table, header(lease, 0, lease=lease.number + 1)) == "expired"
    assert state(lease) is LeaseState.GRANTED


def test_a_unit_is_written_once(table: LeaseTable) -> None:
    lease = granted(table)
    table.begin_unit(header(lease, 0), SENDER, 0.0)
    assert unit_refusal(table, header(lease, 0)) == "duplicate"
    table.end_unit(lease, 0, digest(0), 0.0)
    assert unit_refusal(table, header(lease, 0)) == "duplicate"


def test_a_late_unit_finds_no_lease_and_a_late_end_changes_nothing(table: LeaseTable) -> None:
    lease = granted(table)
    table.begin_unit(header(lease, 0), SENDER, 0.0)
    table.abort(FIRST, 1.0)
    assert unit_refusal(table, header(lease, 1), now=1.0) == "expired"
    table.end_unit(lease, 0, digest(0), 2.0)
    assert state(lease) is LeaseState.REVOKED
    assert lease.landing == set()
    assert lease.landed == {}
    assert table.take_ended() == [lease]


def test_commits_of_others_change_nothing(table: LeaseTable) -> None:
    lease = granted(table)
    land(table, lease, 0, 1)
    message = commit_of(lease)
    assert refusal(table, message, STRANGER) == "refused"
    assert refusal(table, commit_of(lease, capability=b"x" * 16)) == "refused"
    assert refusal(table, commit_of(lease, id=SECOND)) == "refused"
    assert refusal(table, commit_of(lease, lease=99, id=AttemptId("unknown", 1))) == "expired"
    assert state(lease) is LeaseState.RECEIVING


# ---------------------------------------------------------------- endings


def test_release(table: LeaseTable) -> None:
    lease = granted(table)
    for capability, sender in [(b"x" * 16, SENDER), (CAPABILITY, STRANGER)]:
        with pytest.raises(TransferError, match="somebody else"):
            table.release(lease.number, capability, sender, "drained", 0.0)
    table.release(lease.number, CAPABILITY, SENDER, "drained", 0.0)
    table.release(lease.number, CAPABILITY, SENDER, "drained", 0.0)
    table.release(77, CAPABILITY, SENDER, "drained", 0.0)
    assert (lease.state, lease.cause) == (LeaseState.RELEASED, "drained")
    assert table.take_ended() == [lease]


def test_abort_ends_lower_attempts_and_not_higher_ones(table: LeaseTable) -> None:
    lease = granted(table, SECOND)
    table.abort(FIRST, 0.0)
    assert lease.live
    table.abort(AttemptId("r", 3), 0.0)
    assert (lease.state, lease.cause) == (LeaseState.REVOKED, "revoked")
    assert table.superseded(AttemptId("r", 3))
    assert not table.superseded(AttemptId("r", 4))


def test_an_abort_that_comes_first_leaves_a_tombstone(table: LeaseTable) -> None:
    table.abort(SECOND, 0.0)
    assert table.superseded(FIRST)
    assert table.superseded(SECOND)
    table.abort(FIRST, 0.0)
    assert table.superseded(SECOND)  # a lower abort does not bring it back
    with pytest.raises(AssertionError):
        granted(table, SECOND)
    assert table.take_ended() == []


def test_an_abort_after_the_commit_changes_no_answer(table: LeaseTable) -> None:
    lease = granted(table)
    land(table, lease, 0, 1)
    table.commit(commit_of(lease), SENDER, 0.0)
    table.abort(FIRST, 0.0)
    answer = table.commit(commit_of(lease), SENDER, 0.0)
    assert isinstance(answer, Outcome)
    assert answer.committed
    table.abort(SECOND, 0.0)
    assert refusal(table, commit_of(lease)) == "superseded"


def test_a_commit_is_not_answered_with_an_earlier_attempts_outcome(table: LeaseTable) -> None:
    lease = granted(table)
    land(table, lease, 0, 1)
    table.commit(commit_of(lease), SENDER, 0.0)
    assert refusal(table, commit_of(lease, id=SECOND, lease=99)) == "expired"


def test_a_higher_attempt_revokes_the_lower_one(table: LeaseTable) -> None:
    older = granted(table)
    newer = granted(table, SECOND)
    assert (older.state, older.cause) == (LeaseState.REVOKED, "superseded")
    assert newer.number > older.number
    assert table.superseded(FIRST)
    assert table.find(FIRST) is None
    assert table.find(SECOND) is newer
    land(table, newer, 0, 1)
    assert refusal(table, commit_of(older, lease=newer.number)) == "refused"


def test_a_new_life_of_its_sender_leaves_leases_time_to_be_rebound_and_no_more(
    table: LeaseTable,
) -> None:
    leases = [granted(table, AttemptId(f"r{n}", 1)) for n in range(3)]
    table.new_life(SENDER, 1.0)
    table.new_life(OTHER, 1.0)
    assert [lease.deadline for lease in leases] == [TTL] * 3
    table.new_life(STRANGER, 1.0)
    assert table.next_deadline() == leases[0].deadline == 1.0 + TTL / 4
    assert table.rebindable(AttemptId("r0", 2), leases[0].number, 3.0)
    table.expire(3.6)
    assert (table.take_ended(), len(table)) == (leases, 0)
    assert {lease.state for lease in leases} == {LeaseState.EXPIRED}


# ---------------------------------------------------------------- time


def test_a_lease_without_progress_expires(table: LeaseTable) -> None:
    lease = granted(table, now=0.0)
    assert table.next_deadline() == TTL
    table.expire(TTL - 0.1)
    assert lease.live
    table.expire(TTL)
    assert (lease.state, lease.cause) == (LeaseState.EXPIRED, "expired")
    assert table.next_deadline() is None


def test_progress_renews(table: LeaseTable) -> None:
    lease = granted(table, num_units=3)
    land(table, lease, 0, now=6.0)
    table.expire(15.9)
    table.commit(commit_of(lease), SENDER, 15.9)
    land(table, lease, 1, now=25.0)
    table.expire(34.9)
    assert lease.live
    table.expire(35.0)
    assert state(lease) is LeaseState.EXPIRED


def test_a_heartbeat_renews_what_it_names_and_proves(table: LeaseTable) -> None:
    named, other = granted(table), granted(table, AttemptId("other", 1))
    claims = [LeaseClaim(named.number, CAPABILITY), LeaseClaim(other.number, b"x" * 16)]
    table.renew([*claims, LeaseClaim(99, CAPABILITY)], SENDER, 5.0)
    table.renew([LeaseClaim(other.number, CAPABILITY)], STRANGER, 5.0)
    table.expire(12.0)
    assert named.live
    assert state(other) is LeaseState.EXPIRED


def test_a_heartbeat_does_not_hold_a_lease_whose_unit_was_lost(table: LeaseTable) -> None:
    lease = granted(table)
    land(table, lease, 0)
    table.commit(commit_of(lease), SENDER, 0.0)
    for now in range(1, 10):
        table.renew([LeaseClaim(lease.number, CAPABILITY)], SENDER, float(now))
        table.commit(commit_of(lease), SENDER, float(now))  # nor does asking again
    table.expire(TTL)
    assert state(lease) is LeaseState.EXPIRED


def test_no_renewal_goes_past_the_requests_own_deadline(table: LeaseTable) -> None:
    lease = granted(table, deadline_s=15.0)
    for now in (5.0, 9.0, 14.0):
        table.renew([LeaseClaim(lease.number, CAPABILITY)], SENDER, now)
    table.expire(15.0)
    assert state(lease) is LeaseState.EXPIRED


def test_time_runs_before_messages_that_waited(table: LeaseTable) -> None:
    """After a pause a queued message must not bring an overdue lease back."""
    claimed, written, asked = (granted(table, AttemptId(f"r{n}", 1)) for n in range(3))
    table.begin_unit(header(written, 0), SENDER, 0.0)
    table.end_unit(written, 0, digest(0), TTL)
    table.renew([LeaseClaim(claimed.number, CAPABILITY)], SENDER, TTL)
    answer = table.commit(commit_of(asked), SENDER, TTL)
    assert isinstance(answer, Outcome)
    assert not answer.committed
    assert {lease.state for lease in table.take_ended()} == {LeaseState.EXPIRED}
    assert len(table) == 0


# ---------------------------------------------------------------- memory


def test_outcomes_are_bounded_in_number_and_time() -> None:
    table = LeaseTable(ttl_s=TTL, memory_s=100.0, max_outcomes=3)
    for number in range(5):
        table.abort(AttemptId(f"r{number}", 1), float(number))
    known = [table.superseded(AttemptId(f"r{number}", 1)) for number in range(5)]
    assert known == [False, False, True, True, True]
    table.abort(AttemptId("late", 1), 103.5)
    known = [table.superseded(AttemptId(f"r{number}", 1)) for number in range(5)]
    assert known == [False, False, False, False, True]


def test_ended_leases_leave_nothing_but_their_outcome(table: LeaseTable) -> None:
    for number in range(50):
        lease = granted(table, AttemptId(f"r{number}", 1), now=float(number))
        table.release(lease.number, CAPABILITY, SENDER, "drained", float(number))
    table.expire(1000.0)
    assert len(table.take_ended()) == 50
    assert (len(table), table.next_deadline()) == (0, None)


# ---------------------------------------------------------------- rebinding


def rebound(table: LeaseTable, lease: Lease, now: float = 0.0) -> Lease:
    """The next attempt's lease in the room of `lease`, for another prefill node."""
    id = AttemptId(lease.id.request, lease.id.attempt + 1)
    assert table.rebindable(id, lease.number, now)
    return table.grant(
        id,
        sender=OTHER,
        units=lease.units.values(),
        handles=tuple(BlockHandle(9, 100 + index, 6) for index in range(len(lease.handles))),
        capability=b"d" * 16,
        digest_key=b"l" * 16,
        now=now,
        deadline_s=100.0,
        rebinds=True,
    )


def test_a_rebound_lease_begins_anew(table: LeaseTable) -> None:
    old = granted(table)
    land(table, old, 0)
    table.begin_unit(header(old, 1), SENDER, 0.0)
    table.commit(commit_of(old), SENDER, 0.0)
    new = rebound(table, old)
    assert table.take_ended() == [old]
    assert (state(old), old.cause) == (LeaseState.REVOKED, "rebound")
    assert (state(new), new.landed, new.landing, new.manifest) == (
        LeaseState.GRANTED,
        {},
        set(),
        None,
    )


def test_what_the_old_sender_says_does_not_touch_the_new_lease(table: LeaseTable) -> None:
    old = granted(table)
    table.begin_unit(header(old, 1), SENDER, 0.0)
    new = rebound(table, old)
    table.end_unit(old, 1, digest(1), 0.0)
    assert not new.landed
    for lease in (old, new):
        with pytest.raises(TransferError):
            table.begin_unit(header(lease, 0), SENDER, 0.0)
        table.renew([LeaseClaim(lease.number, CAPABILITY)], SENDER, 5.0)
    outcome = table.commit(commit_of(old), SENDER, 0.0)
    assert isinstance(outcome, Outcome)
    assert (outcome.committed, outcome.cause) == (False, "rebound")
    with pytest.raises(TransferError, match="belongs to somebody else"):
        table.commit(commit_of(new), SENDER, 0.0)
    table.release(old.number, CAPABILITY, SENDER, "late", 0.0)
    assert (state(new), new.deadline) == (LeaseState.GRANTED, TTL)
    with pytest.raises(TransferError, match="belongs to somebody else"):
        table.release(new.number, CAPABILITY, SENDER, "late", 0.0)


@pytest.mark.parametrize(
    ("id", "number", "now"),
    [
        (SECOND, 2, 0.0),
        (FIRST, 1, 0.0),
        (AttemptId("other", 2), 1, 0.0),
        (SECOND, 1, TTL),
    ],
    ids=["another lease", "the same attempt", "another request", "too late"],
)
def test_what_cannot_be_rebound(table: LeaseTable, id: AttemptId, number: int, now: float) -> None:
    granted(table)
    assert table.rebindable(SECOND, 1, 0.0)
    assert not table.rebindable(id, number, now)


@pytest.mark.parametrize("ended", ["aborted", "committed"])
def test_an_ended_lease_cannot_be_rebound(table: LeaseTable, ended: str) -> None:
    lease = granted(table)
    if ended == "aborted":
        table.abort(FIRST, 0.0)
    else:
        land(table, lease, 0, 1)
        table.commit(commit_of(lease), SENDER, 0.0)
    assert not table.rebindable(SECOND, lease.number, 0.0)
