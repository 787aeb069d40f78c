"""Random walks over the lease table, held against a model that fits on a page.

The events come in any order, late, twice, and from senders that lie; after each one the table must
agree with the model about who is live, what was committed and when the next deadline is.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.outcomes import Outcome
from tests.kvtransfer.pool import unit_of
from wire.errors import TransferError
from wire.handoff_messages import Commit, LeaseClaim, UnitHeader, UnitSeal
from wire.types import AttemptId, BlockHandle, NodeId

TTL = 10.0
SENDERS = (NodeId("a", 1), NodeId("b", 2))
requests = st.sampled_from(["r", "s", "t"])
attempts = st.integers(1, 4)
mostly = st.integers(0, 9).map(lambda value: value > 0)
picks = st.tuples(mostly, st.integers(0, 1 << 16))  # mostly a live lease; which one
any_index = st.integers(0, 1 << 16)


def true_digest(index: int) -> bytes:
    return bytes([index]) * 16


@dataclass
class Known:
    """What the model knows of one lease."""

    lease: Lease
    deadline: float
    hard_deadline: float
    live: bool = True
    taken: bool = False
    committed_to: tuple[bytes, ...] | None = None  # the digests that the first manifest named
    landing: set[int] = field(default_factory=set)
    landed: dict[int, bytes] = field(default_factory=dict)

    def renew(self, now: float) -> None:
        self.deadline = max(self.deadline, min(now + TTL, self.hard_deadline))


class LeaseWalk(RuleBasedStateMachine):
    """See the module's docstring."""

    @initialize(max_outcomes=st.sampled_from([2, 1000]))
    def start(self, max_outcomes: int) -> None:
        self.max_outcomes = max_outcomes
        self.table = LeaseTable(ttl_s=TTL, memory_s=1e9, max_outcomes=max_outcomes)
        self.now = 0.0
        self.leases: dict[int, Known] = {}
        self.highest_over: dict[str, int] = {}  # request: highest attempt that has ended

    # ------------------------------------------------------------ events

    @rule(
        request=requests,
        step=st.sampled_from([1, 1, 1, 0, -1]),  # from the highest attempt known
        num_units=st.sampled_from([2, 2, 3, 1, 0]),
        deadline_s=st.sampled_from([1000.0, 1000.0, 15.0, 3.0, 0.0]),
        sender=st.sampled_from(SENDERS),
    )
    def grant(
        self, request: str, step: int, num_units: int, deadline_s: float, sender: NodeId
    ) -> None:
        mine = [k.lease.id for k in self.leases.values() if k.lease.id.request == request]
        highest = max([self.highest_over.get(request, 0), *(id.attempt for id in mine)])
        attempt = max(1, highest + step)
        id = AttemptId(request, attempt)
        live = [k for k in self.leases.values() if k.live and k.lease.id.request == request]
        over = attempt <= self.highest_over.get(request, 0)
        higher = any(k.lease.id.attempt > attempt for k in live)
        if self.max_outcomes == 1000 or not over:
            assert self.table.superseded(id) == (over or higher)
        found = self.table.find(id)
        assert (found is not None) == any(k.lease.id == id for k in live)
        if found is not None or self.table.superseded(id):
            return
        lease = self.table.grant(
            id,
            sender=sender,
            units=[unit_of(index) for index in range(num_units)],
            handles=tuple(BlockHandle(9, index, 5) for index in range(num_units)),
            capability=b"c" * 16,
            digest_key=b"k" * 16,
            now=self.now,
            deadline_s=deadline_s,
        )
        assert lease.number not in self.leases
        for known in live:
            self.end(known)
        hard = self.now + deadline_s
        self.leases[lease.number] = Known(lease, min(self.now + TTL, hard), hard)

    @precondition(lambda self: self.leases)
    @rule(pick=picks, unit=st.integers(0, 2), honest=mostly, fresh=mostly)
    def begin_unit(self, pick: tuple[bool, int], unit: int, honest: bool, fresh: bool) -> None:
        known = self.pick(pick)
        header = UnitHeader(
            known.lease.number,
            b"c" * 16 if honest else b"x" * 16,
            unit,
            BlockHandle(9, unit, 5 if fresh else 4),
            unit * 4,
            unit * 4 + 4,
            64,
        )
        self.expire()
        may = known.live and honest and unit in known.lease.units
        new = unit not in known.landing and unit not in known.landed
        try:
            assert self.table.begin_unit(header, known.lease.sender, self.now) is known.lease
        except TransferError:
            assert not (may and fresh and new)
            if may and not fresh:
                self.end(known)
        else:
            assert may
            assert fresh
            assert new
            known.landing.add(unit)

    @precondition(lambda self: any(known.landing for known in self.leases.values()))
    @rule(pick=any_index, digest=st.sampled_from(["true", "true", "true", "false", "none"]))
    def end_unit(self, pick: int, digest: str) -> None:
        """Also long after the lease has ended: a matched receive cannot be revoked."""
        landing = [(k, unit) for k in self.leases.values() for unit in sorted(k.landing)]
        known, unit = landing[pick % len(landing)]
        digests = {"true": true_digest(unit), "false": b"f" * 16, "none": None}
        self.finish_unit(known, unit, digests[digest])

    def finish_unit(self, known: Known, unit: int, bytes_are: bytes | None) -> None:
        self.table.end_unit(known.lease, unit, bytes_are, self.now)
        self.expire()
        known.landing.discard(unit)
        if not known.live:
            return
        if bytes_are is None:
            self.end(known)
            return
        known.landed[unit] = bytes_are
        known.renew(self.now)
        self.judge(known)

    @precondition(lambda self: self.leases)
    @rule(
        pick=picks,
        manifest=st.sampled_from(["true", "true", "true", "false", "short", "long"]),
        honest=mostly,
    )
    def commit(self, pick: tuple[bool, int], manifest: str, honest: bool) -> None:
        known = self.pick(pick)
        if manifest == "short" and not known.lease.units:
            manifest = "long"
        message = self.manifest(known, manifest, honest)
        self.expire()
        was_live = known.live
        try:
            answer = self.table.commit(message, known.lease.sender, self.now)
        except TransferError:
            forgotten = self.max_outcomes < 1000
            later = self.highest_over.get(known.lease.id.request, 0) > known.lease.id.attempt
            assert not (was_live and honest)
            assert was_live or forgotten or later
            return
        if isinstance(answer, Outcome):
            assert not was_live
            committed = known.lease.state is LeaseState.COMMITTED
            if answer.lease == known.lease.number:
                assert answer.committed == committed
            return
        assert answer is known.lease
        named = tuple(seal.digest for seal in message.units)
        if manifest in ("short", "long") or known.committed_to not in (None, named):
            self.end(known)
            return
        if known.committed_to is None:
            known.renew(self.now)
        known.committed_to = named
        self.judge(known)

    @precondition(lambda self: self.leases)
    @rule(pick=picks, honest=mostly)
    def release(self, pick: tuple[bool, int], honest: bool) -> None:
        known = self.pick(pick)
        capability = b"c" * 16 if honest else b"x" * 16
        try:
            self.table.release(
                known.lease.number, capability, known.lease.sender, "drained", self.now
            )
        except TransferError:
            assert not honest
        else:
            self.end(known)

    @rule(request=requests, attempt=attempts)
    def abort(self, request: str, attempt: int) -> None:
        self.table.abort(AttemptId(request, attempt), self.now)
        for known in self.leases.values():
            if known.lease.id.request == request and known.lease.id.attempt <= attempt:
                self.end(known)
        self.highest_over[request] = max(attempt, self.highest_over.get(request, 0))

    @rule(life=st.sampled_from([*SENDERS, NodeId("a", 3), NodeId("z", 1)]))
    def new_life(self, life: NodeId) -> None:
        self.table.new_life(life, self.now)
        for known in self.leases.values():
            if known.lease.sender.name == life.name and known.lease.sender != life:
                known.deadline = min(known.deadline, self.now + TTL / 4)

    @rule(sender=st.sampled_from(SENDERS))
    def renew(self, sender: NodeId) -> None:
        self.table.renew([LeaseClaim(n, b"c" * 16) for n in self.leases], sender, self.now)
        self.expire()
        for known in self.leases.values():
            if known.live and known.lease.sender == sender and known.committed_to is None:
                known.renew(self.now)

    @rule(seconds=st.sampled_from([0.5, 4.0, 6.0, TTL]), tick=st.booleans())
    def pass_time(self, seconds: float, tick: bool) -> None:
        """Without a tick the next event finds overdue leases."""
        self.now += seconds
        if tick:
            self.table.expire(self.now)
            self.expire()

    @precondition(lambda self: self.leases)
    @rule(pick=picks, units=st.permutations(range(3)), count=st.integers(1, 3))
    def land(self, pick: tuple[bool, int], units: list[int], count: int) -> None:
        """What usually happens: units arrive whole."""
        known = self.pick(pick)
        for unit in units[:count]:
            self.begin_unit(pick=pick, unit=unit, honest=True, fresh=True)
            if unit in known.landing:
                self.finish_unit(known, unit, true_digest(unit))

    # ------------------------------------------------------------ the model

    def pick(self, pick: tuple[bool, int]) -> Known:
        live_only, number = pick
        live = [known for known in self.leases.values() if known.live]
        among = live if live_only and live else list(self.leases.values())
        return among[number % len(among)]

    def end(self, known: Known) -> None:
        if known.live:
            known.live = False
            id = known.lease.id
            self.highest_over[id.request] = max(id.attempt, self.highest_over.get(id.request, 0))

    def expire(self) -> None:
        for known in self.leases.values():
            if known.deadline <= self.now:
                self.end(known)

    def judge(self, known: Known) -> None:
        """Ends the model's lease where the table should have committed or rejected it."""
        if known.committed_to is None:
            return
        named = dict(enumerate(known.committed_to))
        wrong = any(named[unit] != digest for unit, digest in known.landed.items())
        if wrong or (known.landed.keys() == known.lease.units.keys() and not known.landing):
            self.end(known)

    def manifest(self, known: Known, kind: str, honest: bool) -> Commit:
        digests = {index: true_digest(index) for index in known.lease.units}
        if kind == "false":
            digests = dict.fromkeys(digests, b"m" * 16)
        elif kind == "long":
            digests[len(digests)] = b"l" * 16
        elif kind == "short":
            digests.popitem()
        seals = tuple(UnitSeal(i, i * 4, i * 4 + 4, digest) for i, digest in digests.items())
        capability = b"c" * 16 if honest else b"x" * 16
        return Commit(known.lease.id, known.lease.number, capability, seals, (5,))

    # ------------------------------------------------------------ what always holds

    @invariant()
    def agrees(self) -> None:
        for lease in self.table.take_ended():
            known = self.leases[lease.number]
            assert not known.taken, "a lease ended twice"
            assert not known.live, f"{lease} should be live"
            assert not lease.live
            known.taken = True
        for known in self.leases.values():
            lease = known.lease
            assert known.live == (not known.taken) == lease.live, lease
            assert lease.landing == known.landing
            if lease.state is LeaseState.COMMITTED:
                assert not lease.landing
                assert known.landed == dict(enumerate(known.committed_to or ()))
                assert known.landed.keys() == lease.units.keys()
        assert len(self.table) == sum(known.live for known in self.leases.values())

    @invariant()
    def next_deadline_is_never_late(self) -> None:
        deadlines = [known.deadline for known in self.leases.values() if known.live]
        next_deadline = self.table.next_deadline()
        if deadlines:
            assert next_deadline is not None
            assert next_deadline <= min(deadlines)

    @invariant()
    def outcomes_are_bounded(self) -> None:
        assert len(self.table._outcomes) <= self.max_outcomes


def test_random_walks() -> None:
    run_state_machine_as_test(
        LeaseWalk, settings=settings(max_examples=150, stateful_step_count=60, deadline=None)
    )
