"""The decode side's leases: who may fill which blocks, until when, and whether it was done right.

The machine is pure: no socket, no clock (`now` is an argument, in seconds), no block pool. Whatever
ends a lease, the lease comes out of `take_ended` exactly once, and the caller acts on its blocks
there. Entering COMMITTED is the one linearization point of a handoff.

Every operation is idempotent on (request, attempt). Outcomes stay as bounded tombstones, so that a
question asked again gets the answer it got before.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping

from kvtransfer.lease import LIVE, Lease, LeaseState
from kvtransfer.outcomes import Outcome, Outcomes
from kvtransfer.units import Unit
from wire.errors import TransferError
from wire.handoff_messages import Commit, LeaseClaim, UnitHeader, UnitSeal
from wire.types import AttemptId, BlockHandle, NodeId


class LeaseTable:
    """All leases of one decode node.

    Args:
        ttl_s: a lease without progress or heartbeat ends after this time.
        memory_s: how long outcomes are remembered; longer than anybody retries.
        max_outcomes: and how many at most.
    """

    def __init__(
        self, *, ttl_s: float, memory_s: float = 900.0, max_outcomes: int = 100_000
    ) -> None:
        self._ttl_s = ttl_s
        self._leases: dict[int, Lease] = {}
        self._by_request: dict[str, Lease] = {}
        self._outcomes = Outcomes(memory_s, max_outcomes)
        self._deadlines: list[tuple[float, int]] = []
        self._ended: list[Lease] = []
        self._last_number = 0

    def __len__(self) -> int:
        return len(self._leases)

    def num_by_state(self) -> dict[str, int]:
        """How many leases are in each live state."""
        counts = Counter(lease.state for lease in self._leases.values())
        return {state.name.lower(): counts[state] for state in LeaseState if state in LIVE}

    # ------------------------------------------------------------ granting

    def find(self, id: AttemptId) -> Lease | None:
        """The live lease of exactly this attempt."""
        lease = self._by_request.get(id.request)
        return lease if lease and lease.id == id else None

    def superseded(self, id: AttemptId) -> bool:
        """Whether this attempt has ended, or a higher one is known."""
        lease = self._by_request.get(id.request)
        outcome = self._outcomes.of(id.request)
        return bool(
            (lease and lease.id.attempt > id.attempt) or (outcome and outcome.attempt >= id.attempt)
        )

    def rebindable(self, id: AttemptId, number: int, now: float) -> bool:
        """Whether this lease lives, and `id` is a later attempt of its request."""
        self.expire(now)
        lease = self._by_request.get(id.request)
        return lease is not None and lease.number == number and lease.id.attempt < id.attempt

    def grant(
        self,
        id: AttemptId,
        *,
        sender: NodeId,
        units: Iterable[Unit],
        handles: tuple[BlockHandle, ...],
        capability: bytes,
        digest_key: bytes,
        now: float,
        deadline_s: float,
        rebinds: bool = False,
    ) -> Lease:
        """A new lease for `id`, which ends the lease of any lower attempt.

        A lease that `rebinds` takes over the room of the older one. It has a number, a capability
        and a key of its own, so nothing that the older sender says can touch it; and as the older
        units' seals are not known, all of its units must arrive anew.
        """
        assert not self.superseded(id), "ask `superseded` first"
        assert self.find(id) is None, "ask `find` first"
        older = self._by_request.get(id.request)
        if older:
            self._end(older, LeaseState.REVOKED, "rebound" if rebinds else "superseded", now)
        self._last_number += 1
        lease = Lease(
            number=self._last_number,
            id=id,
            sender=sender,
            capability=capability,
            digest_key=digest_key,
            units={unit.index: unit for unit in units},
            handles=handles,
            ttl_s=self._ttl_s,
            hard_deadline=now + deadline_s,
            deadline=now + min(self._ttl_s, deadline_s),
        )
        self._leases[lease.number] = lease
        self._by_request[id.request] = lease
        heapq.heappush(self._deadlines, (lease.deadline, lease.number))
        return lease

    # ------------------------------------------------------------ receiving

    def begin_unit(
        self, header: UnitHeader, sender: NodeId, now: float, num_units: int = 1
    ) -> Lease:
        """Allow the bytes behind `header` to be written into their block.

        They are of `num_units` units of that block, the header's and those that follow it: all of
        them may be written, or none.

        Raises:
            TransferError: they must go nowhere; `cause` says why.
        """
        self.expire(now)
        lease = self._claimed(header.lease, header.capability, sender)
        indices = range(header.unit, header.unit + num_units)
        for index in indices:
            self._check_unit(lease, index, header, now)
        lease.landing.update(indices)
        if lease.state is LeaseState.GRANTED:
            lease.state = LeaseState.RECEIVING
        return lease

    def end_unit(
        self, lease: Lease, index: int, digest: bytes | None, now: float, cause: str = "transport"
    ) -> None:
        """The bytes of a unit have landed with this digest (None: they did not, for `cause`)."""
        self.end_units(lease, {index: digest}, now, cause)

    def end_units(
        self, lease: Lease, units: Mapping[int, bytes | None], now: float, cause: str = "transport"
    ) -> None:
        """The same of several units, which nothing writes any more."""
        self.expire(now)
        lease.landing.difference_update(units)
        if not lease.live:
            return
        landed = {index: digest for index, digest in units.items() if digest is not None}
        if len(landed) < len(units):
            self._end(lease, LeaseState.REJECTED, cause, now)
            return
        lease.landed |= landed
        self._renew(lease, now)
        if lease.manifest is not None:
            self._judge(lease, lease.manifest, landed, now)

    # ------------------------------------------------------------ committing

    def commit(self, message: Commit, sender: NodeId, now: float) -> Lease | Outcome:
        """Judge a manifest: the lease (committed, ended, or waiting for late data) or what it was.

        Raises:
            TransferError: the sender has no such lease.
        """
        self.expire(now)
        outcome = self._outcomes.of(message.id.request)
        if message.lease not in self._leases and outcome:
            if outcome.attempt > message.id.attempt:
                raise TransferError("superseded", "a later attempt is known")
            if outcome.attempt == message.id.attempt:
                return outcome
        lease = self._claimed(message.lease, message.capability, sender)
        if lease.id != message.id:
            raise TransferError("refused", f"lease {message.lease} is another attempt's")
        seals = {seal.unit: seal for seal in message.units}
        if not lease.agrees(seals, message.output_tokens):
            self._end(lease, LeaseState.REJECTED, "manifest", now)
        elif lease.manifest is None:
            self._renew(lease, now)
            lease.seals |= seals
            lease.output_tokens = message.output_tokens
            lease.logprobs = lease.logprobs or message.logprobs
            if lease.seals.keys() == lease.units.keys():  # else other ranks have yet to say theirs
                lease.state = LeaseState.COMMITTING
                lease.manifest = lease.seals
                self._judge(lease, lease.manifest, lease.landed, now)
        return lease

    def _judge(
        self, lease: Lease, manifest: dict[int, UnitSeal], landed: dict[int, bytes], now: float
    ) -> None:
        """Reject if what just `landed` contradicts; commit when everything is there and agreed."""
        if any(manifest[index].digest != digest for index, digest in landed.items()):
            self._end(lease, LeaseState.REJECTED, "digest", now)
        elif lease.complete:
            self._end(lease, LeaseState.COMMITTED, "", now)

    # ------------------------------------------------------------ ending

    def release(
        self, number: int, capability: bytes, sender: NodeId, cause: str, now: float
    ) -> None:
        """The sender gives the lease back. An unknown or ended lease is left as it is.

        Raises:
            TransferError: the lease belongs to somebody else.
        """
        if number in self._leases:
            self._end(self._claimed(number, capability, sender), LeaseState.RELEASED, cause, now)

    def abort(self, id: AttemptId, now: float) -> None:
        """Nobody waits for this attempt or a lower one; leaves a tombstone even if unknown."""
        lease = self._by_request.get(id.request)
        if lease and lease.id.attempt <= id.attempt:
            self._end(lease, LeaseState.REVOKED, "revoked", now)
        outcome = self._outcomes.of(id.request)
        if outcome is None or outcome.attempt < id.attempt:
            self._outcomes.remember(id.request, Outcome(id.attempt, 0, False, "revoked", now))

    def new_life(self, sender: NodeId, now: float) -> None:
        """The router names this life of a node, so its earlier ones are over.

        Their leases can only be rebound; a quarter of the TTL is left for that.
        """
        soon = now + self._ttl_s / 4
        for lease in self._leases.values():
            earlier = lease.sender.name == sender.name and lease.sender != sender
            if earlier and lease.deadline > soon:
                lease.deadline = soon
                heapq.heappush(self._deadlines, (lease.deadline, lease.number))

    def renew(self, claims: Iterable[LeaseClaim], sender: NodeId, now: float) -> None:
        """Heartbeats that name their leases; claims that are not the sender's are ignored.

        Once the manifest is here only arriving units are progress: a lost one must not hold the
        blocks for as long as its sender lives.
        """
        self.expire(now)
        for claim in claims:
            lease = self._leases.get(claim.lease)
            if lease is None or lease.manifest is not None:
                continue
            if lease.sender == sender and lease.proves(claim.capability):
                self._renew(lease, now)

    def expire(self, now: float) -> None:
        """End every lease whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            lease = self._leases.get(number)
            if lease is None:
                continue
            if lease.deadline > now:  # renewed since this entry was made
                heapq.heappush(self._deadlines, (lease.deadline, number))
            else:
                self._end(lease, LeaseState.EXPIRED, "expired", now)

    def next_deadline(self) -> float | None:
        """When `expire` should be called next; may be early, never late."""
        return self._deadlines[0][0] if self._deadlines else None

    def take_ended(self) -> list[Lease]:
        """Leases that ended since the last call, each one once."""
        ended, self._ended = self._ended, []
        return ended

    # ------------------------------------------------------------ inside

    def _check_unit(self, lease: Lease, index: int, header: UnitHeader, now: float) -> None:
        unit = lease.units.get(index)
        if (
            unit is None
            or unit.token_start != header.token_start
            or unit.token_end != header.token_end
        ):
            raise TransferError("refused", f"unit {index} is not part of the lease")
        if lease.handles[unit.block] != header.handle:
            self._end(lease, LeaseState.REJECTED, "stale", now)
            raise TransferError("stale", f"unit {index} names another generation")
        if index in lease.landed or index in lease.landing:
            raise TransferError("duplicate", f"unit {index} was written before")

    def _claimed(self, number: int, capability: bytes, sender: NodeId) -> Lease:
        lease = self._leases.get(number)
        if lease is None:
            raise TransferError("expired", f"lease {number} is not live")
        if lease.sender != sender or not lease.proves(capability):
            raise TransferError("refused", f"lease {number} belongs to somebody else")
        return lease

    def _renew(self, lease: Lease, now: float) -> None:
        lease.deadline = max(lease.deadline, min(now + lease.ttl_s, lease.hard_deadline))

    def _end(self, lease: Lease, state: LeaseState, cause: str, now: float) -> None:
        assert lease.live, f"lease {lease.number} ended twice"
        lease.state = state
        lease.cause = cause
        del self._leases[lease.number]
        del self._by_request[lease.id.request]
        committed = state is LeaseState.COMMITTED
        self._outcomes.remember(
            lease.id.request, Outcome(lease.id.attempt, lease.number, committed, cause, now)
        )
        self._ended.append(lease)
