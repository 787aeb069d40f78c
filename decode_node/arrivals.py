"""Attempts whose KV is on its way here: from a router's question for room to the end of the lease.

    Reserve ─▶ engine.reserve ─▶ lease ─▶ Granted      before any prefill is spent
    Rebind ──▶ engine.rebind ──▶ lease ─▶ Granted      the same room, another prefill node
    units, Commit ─▶ lease committed ─▶ `Host.arrived`

A reservation's blocks belong to its lease until the lease ends; `_lease_ended` is the one place
where they are passed on or become free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from engine.reservations import Reservation
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.transport import TransferStats
from node.router_link import RouterLink
from node.shell import NodeShell
from node.transports import public_address, unit_receivers
from wire.errors import CapacityError
from wire.geometry import Geometry, geometry_for
from wire.logprobs import UNKNOWN
from wire.request_messages import Generate, Grant, Granted, Rebind, Refused, Reserve
from wire.types import AttemptId, SamplingParams


@dataclass(slots=True)
class Arrival:
    """One attempt whose KV has not arrived yet."""

    link: RouterLink
    message: Reserve
    reservation: Reservation
    grant: Grant

    @property
    def id(self) -> AttemptId:
        return self.message.id


class Host(Protocol):
    """Who has the attempts that generate (the role)."""

    @property
    def draining(self) -> bool: ...

    def running_attempt(self, request: str) -> int:
        """The attempt of this request that generates here; 0: there is none."""
        ...

    def end_running(self, id: AttemptId) -> None:
        """End this attempt and any lower one."""
        ...

    def arrived(self, arrival: Arrival, lease: Lease) -> None:
        """All KV is here and verified; the reservation is the host's from now on."""
        ...

    def lost(self, arrival: Arrival, cause: str, message: str) -> None:
        """It will not arrive, and its router is to be told."""
        ...


class Arrivals:
    """At most one attempt of each request."""

    def __init__(self, shell: NodeShell, stats: TransferStats, host: Host) -> None:
        self._shell = shell
        self._engine = shell.engine
        self._host = host
        self.receiver = KVReceiver(
            memory=shell.built.memory,
            table=LeaseTable(ttl_s=shell.config.lease_ttl_s),
            send=shell.send_peer,
            on_ended=self._lease_ended,
            model_fingerprint=shell.built.info.fingerprint,
            stats=stats,
        )
        self._unit_receivers = unit_receivers(
            shell.config,
            shell.me,
            self.receiver,
            stats,
            shell.context,
            shell.built.open_pool,
        )
        self.transports = tuple(
            public_address(receiver.address, shell.config) for receiver in self._unit_receivers
        )
        self._pending: dict[str, Arrival] = {}  # by request

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, id: AttemptId) -> bool:
        arrival = self._pending.get(id.request)
        return arrival is not None and arrival.id == id

    # ------------------------------------------------------------ questions of routers

    def reserve(self, link: RouterLink, message: Reserve) -> None:
        """Answer with a grant, or with why there is none."""
        if self._answered_before(link, message.id):
            return
        refusal = self.refusal(message)
        if refusal is not None:
            link.send(refusal)
            return
        self.end_lower(message.id)  # its room is needed
        try:
            granted = self._grant(link, message, self._reservation(message))
        except CapacityError as error:
            link.send(Refused(message.id, "capacity", str(error), error.retry_after_s))
        else:
            link.send(granted)

    def _answered_before(self, link: RouterLink, id: AttemptId) -> bool:
        """Asked again: the same answer."""
        pending = self._pending.get(id.request)
        if pending is None or pending.id != id:
            return False
        link.send(Granted(id, pending.grant))
        return True

    def end_lower(self, id: AttemptId) -> None:
        """Lower attempts than this one of its request have nothing to come back to."""
        pending = self._pending.get(id.request)
        if pending is not None and pending.id.attempt < id.attempt:
            self.receiver.abort(pending.id)
        self._host.end_running(AttemptId(id.request, id.attempt - 1))

    def rebind(self, link: RouterLink, message: Rebind) -> None:
        """The same, in the room of an earlier attempt, which ends whatever the answer."""
        if self._answered_before(link, message.id):
            return
        answer = self._rebound(link, message)
        if isinstance(answer, Refused):
            self.end_lower(message.id)
        link.send(answer)

    def _rebound(self, link: RouterLink, message: Rebind) -> Granted | Refused:
        """The grant to the new prefill node; the room is the one that was reserved before."""
        id = message.id
        live = self.receiver.rebindable(id, message.lease)
        pending = self._pending.get(id.request)
        if pending is None or not live:
            return Refused(id, "gone", "there is no such lease (any more)")
        reserve = _next_attempt(pending.message, message)
        refusal = self.refusal(reserve)
        if refusal is not None:
            return refusal
        try:
            reservation = self._engine.rebind(
                pending.reservation.id, reserve.tokens, reserve.cache_salt
            )
        except CapacityError as error:
            return Refused(id, "capacity", str(error), error.retry_after_s)
        return self._grant(link, reserve, reservation, rebinds=True)

    def refusal(self, message: Reserve | Generate) -> Refused | None:
        """Why this attempt cannot be served here whatever is free; None if it can."""
        id = message.id
        running = self._host.running_attempt(id.request)
        if self.receiver.table.superseded(id) or running >= id.attempt:
            return Refused(id, "superseded", "this attempt has ended or a later one is known")
        if self._host.draining:
            return Refused(id, "draining", "the node is shutting down")
        mistake = self._shell.built.mistake(
            message.tokens, message.num_prompt_tokens, message.sampling
        )
        if mistake is not None:
            return Refused(id, "invalid", mistake)
        if width_of(message.sampling) > self._engine.num_seats:
            text = f"a beam search of more than {self._engine.num_seats} beams"
            return Refused(id, "invalid", f"{text} is more than a step of this node computes")
        return self._too_long(message)

    def _too_long(self, message: Reserve | Generate) -> Refused | None:
        limit = self.max_num_tokens(message)
        # One token comes from the prefill node, so at least one more must fit here.
        if len(message.tokens) + isinstance(message, Reserve) >= limit:
            return Refused(message.id, "too_long", "no room for output")
        width = width_of(message.sampling)
        # The last token's KV is never computed.
        if not self._shell.built.can_hold(limit - 1, len(message.tokens), width):
            return Refused(message.id, "too_long", f"{limit} tokens are more than this node holds")
        return None

    def _reservation(self, message: Reserve) -> Reservation:
        reservation = self._engine.reserve(
            list(message.tokens),
            self.max_num_tokens(message),
            message.cache_salt,
            width_of(message.sampling),
        )
        self._shell.stats.count_lookup(len(message.tokens), reservation.num_cached_tokens)
        return reservation

    def _grant(
        self, link: RouterLink, message: Reserve, reservation: Reservation, rebinds: bool = False
    ) -> Granted:
        geometry = self._geometry(message)
        lease = self.receiver.grant(
            message.id,
            sender=message.prefill,
            tokens=message.tokens,
            num_cached_tokens=reservation.num_cached_tokens,
            handles=reservation.handles,
            cache_salt=message.cache_salt,
            deadline_s=message.deadline_s,
            geometry=geometry,
            rebinds=rebinds,
        )
        grant = self._grant_message(lease, reservation, geometry)
        self._pending[message.id.request] = Arrival(link, message, reservation, grant)
        return Granted(message.id, grant)

    def _grant_message(self, lease: Lease, reservation: Reservation, geometry: Geometry) -> Grant:
        return Grant(
            lease=lease.number,
            capability=lease.capability,
            digest_key=lease.digest_key,
            decode=self._shell.me,
            peer_url=self._shell.peer_url,
            transports=self.transports,
            layout=self._shell.built.layout,
            handles=reservation.handles,
            num_cached_tokens=reservation.num_cached_tokens,
            ttl_s=self._shell.config.lease_ttl_s,
            geometry=geometry,
        )

    def _geometry(self, message: Reserve) -> Geometry:
        return geometry_for(
            self._shell.built.layout, message.prefill_layout, self._shell.config.transfer_dtype
        )

    def max_num_tokens(self, message: Reserve | Generate) -> int:
        limit = message.num_prompt_tokens + message.sampling.max_tokens
        return min(limit, self._shell.built.max_model_len)

    # ------------------------------------------------------------ endings

    def abort(self, id: AttemptId) -> None:
        """The router gave this attempt up, and all lower ones."""
        self.receiver.abort(id)

    def fail(self, affected: Callable[[Arrival], bool], cause: str, message: str) -> None:
        """End those that are affected."""
        for arrival in [a for a in self._pending.values() if affected(a)]:
            self.receiver.abort(arrival.id)
            self._host.lost(arrival, cause, message)

    def _lease_ended(self, lease: Lease) -> None:
        """Called once per lease, whatever ended it."""
        pending = self._pending[lease.id.request]
        assert pending.id == lease.id, "a new lease is granted only after the old one ended"
        del self._pending[lease.id.request]
        if lease.cause == "rebound":
            return  # its room is another reservation's already
        if lease.state is LeaseState.COMMITTED and self._continues(pending, lease):
            self._host.arrived(pending, lease)
            return
        self._engine.cancel_reservation(pending.reservation.id)
        if lease.state in (LeaseState.REJECTED, LeaseState.EXPIRED):
            self._host.lost(pending, lease.cause, "the KV cache did not arrive whole")
        elif lease.state is LeaseState.COMMITTED:
            self._host.lost(pending, "manifest", "the commit names other output tokens")

    def _continues(self, pending: Arrival, lease: Lease) -> bool:
        """Whether the output is what the reservation had, and exactly one token more."""
        message, output = pending.message, lease.output_tokens
        known = message.tokens[message.num_prompt_tokens :]
        rows = () if lease.logprobs is None else lease.logprobs.tokens
        same = output[:-1] == known and len(output) == len(known) + 1
        told = len(rows) in (0, len(output))
        if message.sampling.beam is not None:
            told = len(rows) == 1 and rows[0] != UNKNOWN
        return same and told

    def close(self) -> None:
        for receiver in self._unit_receivers:
            receiver.close()


def width_of(sampling: SamplingParams) -> int:
    """How many rows it runs as here."""
    return 1 if sampling.beam is None else sampling.beam.width


def _next_attempt(reserved: Reserve, message: Rebind) -> Reserve:
    """What is reserved, as the attempt that goes on with it would have asked for it."""
    prompt = reserved.tokens[: reserved.num_prompt_tokens]
    return replace(
        reserved,
        id=message.id,
        tokens=prompt + message.output_tokens,
        prefill=message.prefill,
        deadline_s=message.deadline_s,
        prefill_layout=message.prefill_layout,
    )
