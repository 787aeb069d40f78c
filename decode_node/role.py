"""What a decode node does with a request.

    Reserve ─▶ engine.reserve ─▶ lease ─▶ Granted      before any prefill is spent
    Rebind ──▶ engine.rebind ──▶ lease ─▶ Granted      the same room, another prefill node
    units, Commit ─▶ lease committed ─▶ engine.adopt ─▶ joins the next step
    steps ─▶ Tokens to the router ─▶ Ack

A reservation's blocks belong to its lease until the lease ends; `_lease_ended` is the one place
where they become the request's or free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from engine.plan import LayerProgress, StepResult
from engine.request import Request
from engine.reservations import Reservation
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.transport import TransferStats
from node.router_link import RouterLink
from node.shell import NodeShell
from node.token_outbox import TokenOutbox
from node.transports import public_address, unit_receivers
from wire.errors import CapacityError
from wire.geometry import Geometry, geometry_for
from wire.messages import (
    Abort,
    Ack,
    AttemptFailed,
    Grant,
    Granted,
    Message,
    Rebind,
    Refused,
    Resend,
    Reserve,
)
from wire.types import AttemptId, NodeId, Role

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """An attempt whose KV has not arrived yet."""

    link: RouterLink
    message: Reserve
    reservation: Reservation
    grant: Grant

    @property
    def id(self) -> AttemptId:
        return self.message.id


@dataclass(slots=True)
class _Running:
    """An attempt that generates."""

    id: AttemptId
    link: RouterLink
    request: Request


class DecodeRole:
    """See node.role.Role."""

    name = Role.DECODE

    def __init__(self, shell: NodeShell) -> None:
        self.stats = TransferStats()
        self._shell = shell
        self._engine = shell.engine
        self._outbox = TokenOutbox()
        self._receiver = KVReceiver(
            memory=shell.built.memory,
            table=LeaseTable(ttl_s=shell.config.lease_ttl_s),
            send=shell.send_peer,
            on_ended=self._lease_ended,
            model_fingerprint=shell.built.info.fingerprint,
            stats=self.stats,
        )
        self._unit_receivers = unit_receivers(
            shell.config, shell.me, self._receiver, self.stats, shell.context
        )
        self.transports = tuple(
            public_address(receiver.address, shell.config) for receiver in self._unit_receivers
        )
        self._pending: dict[str, _Pending] = {}  # by request: at most one attempt of each
        self._running: dict[str, _Running] = {}
        self._draining = False

    @property
    def open_transfers(self) -> dict[str, int]:
        return self._receiver.table.num_by_state()

    @property
    def num_attempts(self) -> int:
        return len(self._pending) + len(self._running)

    # ------------------------------------------------------------ messages of routers

    def handle(self, link: RouterLink, message: Message) -> None:
        if isinstance(message, Reserve):
            self._reserve(link, message)
        elif isinstance(message, Rebind):
            self._rebind(link, message)
        elif isinstance(message, Abort):
            self._abort(message.id)
        elif isinstance(message, Resend):
            self._resend(link, message)
        elif isinstance(message, Ack):
            self._outbox.forget(message.id)

    def _resend(self, link: RouterLink, message: Resend) -> None:
        pending = self._pending.get(message.id.request)
        is_pending = pending is not None and pending.id == message.id
        if not self._outbox.resend(message.id, message.index) and not is_pending:
            self._fail(link, message.id, "gone", "the decode node does not know the attempt")

    def _reserve(self, link: RouterLink, message: Reserve) -> None:
        if self._answered_before(link, message.id):
            return
        refusal = self._refusal(message)
        if refusal is not None:
            link.send(refusal)
            return
        self._end_lower(message.id)  # its room is needed
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

    def _end_lower(self, id: AttemptId) -> None:
        """Lower attempts than this one of its request have nothing to come back to."""
        pending = self._pending.get(id.request)
        if pending is not None and pending.id.attempt < id.attempt:
            self._receiver.abort(pending.id)
        self._end_running(AttemptId(id.request, id.attempt - 1))

    def _rebind(self, link: RouterLink, message: Rebind) -> None:
        if self._answered_before(link, message.id):
            return
        answer = self._rebound(link, message)
        if isinstance(answer, Refused):
            self._end_lower(message.id)
        link.send(answer)

    def _rebound(self, link: RouterLink, message: Rebind) -> Granted | Refused:
        """The grant to the new prefill node; the room is the one that was reserved before."""
        id = message.id
        live = self._receiver.rebindable(id, message.lease)
        pending = self._pending.get(id.request)
        if pending is None or not live:
            return Refused(id, "gone", "there is no such lease (any more)")
        reserve = _next_attempt(pending.message, message)
        refusal = self._refusal(reserve)
        if refusal is not None:
            return refusal
        try:
            reservation = self._engine.rebind(
                pending.reservation.id, reserve.tokens, reserve.cache_salt
            )
        except CapacityError as error:
            return Refused(id, "capacity", str(error), error.retry_after_s)
        return self._grant(link, reserve, reservation, rebinds=True)

    def _refusal(self, message: Reserve) -> Refused | None:
        """Why this attempt cannot be served here whatever is free; None if it can."""
        id = message.id
        running = self._running.get(id.request)
        superseded = self._receiver.table.superseded(id)
        if superseded or (running is not None and running.id.attempt >= id.attempt):
            return Refused(id, "superseded", "this attempt has ended or a later one is known")
        if self._draining:
            return Refused(id, "draining", "the node is shutting down")
        mistake = self._shell.built.mistake(
            message.tokens, message.num_prompt_tokens, message.sampling
        )
        if mistake is not None:
            return Refused(id, "invalid", mistake)
        return self._too_long(message)

    def _too_long(self, message: Reserve) -> Refused | None:
        limit = self._max_num_tokens(message)
        if len(message.tokens) + 1 >= limit:
            # One token comes from the prefill node, so at least one more must fit here.
            return Refused(message.id, "too_long", "no room for output")
        if not self._shell.built.can_hold(limit - 1):  # the last token's KV is never computed
            return Refused(message.id, "too_long", f"{limit} tokens are more than this node holds")
        return None

    def _reservation(self, message: Reserve) -> Reservation:
        reservation = self._engine.reserve(
            list(message.tokens), self._max_num_tokens(message), message.cache_salt
        )
        self._shell.stats.count_lookup(len(message.tokens), reservation.num_cached_tokens)
        return reservation

    def _grant(
        self, link: RouterLink, message: Reserve, reservation: Reservation, rebinds: bool = False
    ) -> Granted:
        geometry = self._geometry(message)
        lease = self._receiver.grant(
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
        self._pending[message.id.request] = _Pending(link, message, reservation, grant)
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

    def _max_num_tokens(self, message: Reserve) -> int:
        limit = message.num_prompt_tokens + message.sampling.max_tokens
        return min(limit, self._shell.built.max_model_len)

    def _abort(self, id: AttemptId) -> None:
        """End this attempt and any lower one of the request, wherever they are."""
        self._outbox.forget(id)
        self._receiver.abort(id)  # a pending one comes back through `_lease_ended`
        self._end_running(id)

    def _end_running(self, id: AttemptId) -> None:
        running = self._running.get(id.request)
        if running is not None and running.id.attempt <= id.attempt:
            del self._running[id.request]
            self._outbox.forget(running.id)
            self._engine.abort(running.request.request_id)

    # ------------------------------------------------------------ the handoff

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        self._receiver.handle(sender, message)

    def _lease_ended(self, lease: Lease) -> None:
        """Called once per lease, whatever ended it."""
        pending = self._pending[lease.id.request]
        assert pending.id == lease.id, "a new lease is granted only after the old one ended"
        del self._pending[lease.id.request]
        if lease.cause == "rebound":
            return  # its room is another reservation's already
        if lease.state is LeaseState.COMMITTED and self._continues(pending, lease):
            self._begin(pending, lease)
            return
        self._engine.cancel_reservation(pending.reservation.id)
        if lease.state in (LeaseState.REJECTED, LeaseState.EXPIRED):
            self._fail(pending.link, lease.id, lease.cause, "the KV cache did not arrive whole")
        elif lease.state is LeaseState.COMMITTED:
            self._fail(pending.link, lease.id, "manifest", "the commit names other output tokens")

    def _continues(self, pending: _Pending, lease: Lease) -> bool:
        """Whether the output is what the reservation had, and exactly one token more."""
        message, output = pending.message, lease.output_tokens
        known = message.tokens[message.num_prompt_tokens :]
        rows = () if lease.logprobs is None else lease.logprobs.tokens
        same = output[:-1] == known and len(output) == len(known) + 1
        return same and len(rows) in (0, len(output))

    def _begin(self, pending: _Pending, lease: Lease) -> None:
        id, request = pending.id, self._request(pending.message, lease.output_tokens[-1])
        try:
            self._engine.adopt(pending.reservation.id, request)
        except (KeyError, ValueError) as error:
            log.exception("%s was reserved, but is not adopted", id)
            self._engine.cancel_reservation(pending.reservation.id)
            self._fail(pending.link, id, "internal", f"the engine does not adopt it: {error}")
            return
        self._running[id.request] = _Running(id, pending.link, request)
        # The new holder repeats all output tokens: the router compares them with its log.
        self._outbox.open(id, pending.link)
        self._outbox.add(id, lease.output_tokens, None, logprobs=lease.logprobs)
        self._outbox.flush()
        self._shell.wake()

    def _request(self, message: Reserve, first_token: int) -> Request:
        return Request(
            request_id=str(message.id),
            tokens=[*message.tokens, first_token],
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            max_num_tokens=self._max_num_tokens(message),
            cache_salt=message.cache_salt,
        )

    # ------------------------------------------------------------ steps

    def on_step(self, result: StepResult) -> None:
        for progress in result.progress:
            request, _, attempt = progress.request_id.rpartition("/")
            running = self._running.get(request)
            if running is None or running.id.attempt != int(attempt) or not progress.new_tokens:
                continue
            self._outbox.add(
                running.id,
                progress.new_tokens,
                progress.finish_reason,
                logprobs=progress.logprobs,
            )
            if progress.finish_reason is not None:
                del self._running[request]
        self._outbox.flush()

    def on_layers(self, progress: LayerProgress) -> None:
        """Nothing leaves a decode node before its step is done."""

    # ------------------------------------------------------------ endings

    def _fail(self, link: RouterLink, id: AttemptId, cause: str, message: str) -> None:
        self._outbox.forget(id)
        link.send(AttemptFailed(id, cause, message[:4096], retryable=True))

    def fail(self, request_ids: Collection[str], cause: str, message: str) -> None:
        self._fail_running(lambda r: r.request.request_id in request_ids, cause, message)

    def fail_all(self, cause: str, message: str) -> None:
        self._fail_running(lambda running: True, cause, message)
        self._fail_pending(lambda pending: True, cause, message)

    def router_lost(self, link: RouterLink) -> None:
        self._fail_running(lambda running: running.link is link, "revoked", "the router is gone")
        self._fail_pending(lambda pending: pending.link is link, "revoked", "the router is gone")
        self._outbox.forget_router(link)

    def _fail_running(self, affected: Callable[[_Running], bool], cause: str, message: str) -> None:
        for running in [r for r in self._running.values() if affected(r)]:
            self._end_running(running.id)
            self._fail(running.link, running.id, cause, message)

    def _fail_pending(self, affected: Callable[[_Pending], bool], cause: str, message: str) -> None:
        for pending in [p for p in self._pending.values() if affected(p)]:
            self._receiver.abort(pending.id)
            self._fail(pending.link, pending.id, cause, message)

    def drain(self) -> None:
        self._draining = True

    def tick(self) -> None:
        self._receiver.tick()
        self._outbox.expire()

    def close(self) -> None:
        for receiver in self._unit_receivers:
            receiver.close()


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
