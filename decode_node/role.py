"""What a decode node does with a request.

    Reserve … Commit ─▶ its KV has arrived ─▶ engine.adopt ─▶ joins the next step
    Generate ─▶ engine.add ─▶ its prompt is computed here, in chunks between others' tokens
    steps ─▶ Tokens to the router ─▶ Ack

Room, leases and all until the KV is here are in `arrivals`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from decode_node.arrivals import Arrival, Arrivals
from engine.plan import LayerProgress, RequestProgress, StepResult
from engine.request import Request
from kvtransfer.lease import Lease
from kvtransfer.transport import TransferStats
from node.attempt_clock import AttemptClock
from node.role import OpenTransfers
from node.router_link import RouterLink
from node.shell import NodeShell
from node.token_outbox import TokenOutbox
from telemetry.metrics import LEASES
from wire.errors import CapacityError
from wire.logprobs import UNKNOWN, Logprobs
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    BeamsFound,
    Generate,
    Rebind,
    Refused,
    Resend,
    Reserve,
)
from wire.types import AttemptId, NodeId, Role

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Running:
    """An attempt that generates."""

    id: AttemptId
    link: RouterLink
    request: Request
    clock: AttemptClock | None = None  # while its prompt is computed here


class DecodeRole:
    """See node.role.Role."""

    name = Role.DECODE

    def __init__(self, shell: NodeShell) -> None:
        self.stats: TransferStats = shell.transfers
        self._shell = shell
        self._engine = shell.engine
        self._outbox = TokenOutbox()
        self._arrivals = Arrivals(shell, self.stats, self)
        self._receiver = self._arrivals.receiver
        self.transports = self._arrivals.transports
        self._running: dict[str, _Running] = {}  # by request: at most one attempt of each
        self.draining = False

    @property
    def open_transfers(self) -> OpenTransfers:
        return {LEASES: self._receiver.table.num_by_state()}

    @property
    def num_attempts(self) -> int:
        return len(self._arrivals) + len(self._running)

    def knows(self, id: AttemptId) -> bool:
        return id in self._outbox or id in self._arrivals

    # ------------------------------------------------------------ messages of routers

    def handle(self, link: RouterLink, message: Message) -> None:
        if isinstance(message, Reserve):
            self._arrivals.reserve(link, message)
        elif isinstance(message, Rebind):
            self._arrivals.rebind(link, message)
        elif isinstance(message, Generate):
            self._generate(link, message)
        elif isinstance(message, Abort):
            self._abort(message.id)
        elif isinstance(message, Resend):
            self._resend(link, message)
        elif isinstance(message, Ack):
            self._outbox.forget(message.id)
            self._arrivals.abort(message.id)  # nothing is left of it; nor may it begin again

    def _resend(self, link: RouterLink, message: Resend) -> None:
        known = self._outbox.resend(message.id, message.index) or message.id in self._arrivals
        if not known:
            self._fail(link, message.id, "gone", "the decode node does not know the attempt")

    def _abort(self, id: AttemptId) -> None:
        """End this attempt and any lower one of the request, wherever they are."""
        self._outbox.forget(id)
        self._arrivals.abort(id)
        self.end_running(id)

    # ------------------------------------------------------------ requests from their prompt on

    def _generate(self, link: RouterLink, message: Generate) -> None:
        """Take the whole request, or say why not."""
        id = message.id
        if id in self._outbox:
            return  # asked twice
        refusal = self._arrivals.refusal(message)
        if refusal is not None:
            link.send(refusal)
            return
        self._arrivals.end_lower(id)
        request = self._request(message, ())
        try:
            self._engine.add(request, only_with_room=True)
        except CapacityError as error:
            link.send(Refused(id, "capacity", str(error), error.retry_after_s))
        except ValueError as error:
            self._fail(link, id, "internal", f"the engine does not take it: {error}")
        else:
            self._begin(link, message, request)

    def _begin(self, link: RouterLink, message: Generate, request: Request) -> None:
        """Like every new holder it repeats the output so far, and so says that it has it."""
        id = message.id
        self._running[id.request] = _Running(id, link, request, AttemptClock(time.monotonic()))
        output = message.tokens[message.num_prompt_tokens :]
        told = output and message.sampling.logprobs is not None
        self._outbox.open(id, link)
        # Nobody here has ever known their logprobs; the router has had them.
        self._outbox.add(
            id, output, None, logprobs=Logprobs((UNKNOWN,) * len(output)) if told else None
        )
        self._outbox.flush()

    # ------------------------------------------------------------ attempts that generate (Host)

    def running_attempt(self, request: str) -> int:
        running = self._running.get(request)
        return 0 if running is None else running.id.attempt

    def end_running(self, id: AttemptId) -> None:
        running = self._running.get(id.request)
        if running is not None and running.id.attempt <= id.attempt:
            del self._running[id.request]
            self._outbox.forget(running.id)
            self._engine.abort(running.request.request_id)

    # ------------------------------------------------------------ the handoff

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        self._receiver.handle(sender, message)

    def arrived(self, arrival: Arrival, lease: Lease) -> None:
        id, searches = arrival.id, arrival.message.sampling.beam is not None
        # A search begins with all that the first token could have been.
        output = () if searches else lease.output_tokens
        row = lease.logprobs.tokens[-1] if searches and lease.logprobs is not None else b""
        request = self._request(arrival.message, output[-1:])
        try:
            self._engine.adopt(arrival.reservation.id, request, row)
        except (KeyError, ValueError) as error:
            log.exception("%s was reserved, but is not adopted", id)
            self._engine.cancel_reservation(arrival.reservation.id)
            self._fail(arrival.link, id, "internal", f"the engine does not adopt it: {error}")
            return
        self._running[id.request] = _Running(id, arrival.link, request)
        # The new holder repeats all output tokens: the router compares them with its log.
        self._outbox.open(id, arrival.link)
        self._outbox.add(id, output, None, logprobs=None if searches else lease.logprobs)
        self._outbox.flush()
        self._shell.wake()

    def lost(self, arrival: Arrival, cause: str, message: str) -> None:
        self._fail(arrival.link, arrival.id, cause, message)

    def _request(self, message: Reserve | Generate, first: tuple[int, ...]) -> Request:
        return Request(
            request_id=str(message.id),
            tokens=[*message.tokens, *first],
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            max_num_tokens=self._arrivals.max_num_tokens(message),
            cache_salt=message.cache_salt,
        )

    # ------------------------------------------------------------ steps

    def on_step(self, result: StepResult) -> None:
        now = time.monotonic()
        for progress in result.progress:
            running = self._by_key(progress.request_id)
            if running is None:
                continue
            if running.clock is not None:
                running.clock.step_over(now, result.seconds)
            self._tell(running, progress)
        self._outbox.flush()

    def _by_key(self, request_id: str) -> _Running | None:
        request, _, attempt = request_id.rpartition("/")
        running = self._running.get(request)
        return running if running is not None and running.id.attempt == int(attempt) else None

    def _tell(self, running: _Running, progress: RequestProgress) -> None:
        """Queue what a step has produced for the router."""
        id, timing = running.id, None
        if running.clock is not None and self._has_computed_prompt(running, progress):
            timing, running.clock = running.clock.timing(), None
            num_cached = progress.num_cached_tokens
            self._shell.stats.count_lookup(progress.num_computed_tokens, num_cached)
        if timing is not None or progress.new_tokens:
            self._outbox.add(
                id,
                progress.new_tokens,
                progress.finish_reason,
                None if timing is None else progress.num_cached_tokens,
                progress.logprobs,
                timing,
            )
        if progress.hypotheses:
            self._outbox.flush()
            self._outbox.end_with(BeamsFound(id, progress.hypotheses))
        if progress.hypotheses or progress.finish_reason is not None:
            del self._running[id.request]

    def _has_computed_prompt(self, running: _Running, progress: RequestProgress) -> bool:
        """A search chooses no token then."""
        searches = running.request.sampling.beam is not None
        num_known = len(running.request.tokens) if searches else 0
        return bool(progress.new_tokens) or 0 < num_known <= progress.num_computed_tokens

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
        self._arrivals.fail(lambda arrival: True, cause, message)

    def router_lost(self, link: RouterLink) -> None:
        self._fail_running(lambda running: running.link is link, "revoked", "the router is gone")
        self._arrivals.fail(lambda arrival: arrival.link is link, "revoked", "the router is gone")
        self._outbox.forget_router(link)

    def _fail_running(self, affected: Callable[[_Running], bool], cause: str, message: str) -> None:
        for running in [r for r in self._running.values() if affected(r)]:
            self.end_running(running.id)
            self._fail(running.link, running.id, cause, message)

    def drain(self) -> None:
        self.draining = True

    def tick(self) -> None:
        self._receiver.tick()
        self._outbox.expire()

    def close(self) -> None:
        self._arrivals.close()
