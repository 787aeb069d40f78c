"""What a prefill node does with a request.

    Prefill ─▶ engine.add ─▶ steps ─▶ finished blocks leave while the next chunk computes
                                └──▶ first token: at once to the router, and in the commit
    Committed ─▶ blocks released

The request's blocks stay held until the handoff has ended; whatever ends the attempt, `_free` is
where they are given back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from engine.plan import LayerProgress, RequestProgress, StepResult
from engine.request import Request
from kvtransfer.handoff import Handoff, HandoffState
from kvtransfer.sender import KVSender
from kvtransfer.transport import TransferStats
from node.attempt_clock import AttemptClock
from node.role import OpenTransfers
from node.router_link import RouterLink
from node.shell import NodeShell
from node.token_outbox import TokenOutbox
from node.transports import unit_senders
from prefill_node.peers import PeerLinks
from telemetry.metrics import HANDOFFS_OPEN
from wire.errors import CapacityError, TransferError
from wire.logprobs import UNKNOWN, Logprobs
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    BeamsFound,
    Embedding,
    HandoffDone,
    Prefill,
    Resend,
)
from wire.types import AttemptId, NodeId, Role, TransportAddress

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Work:
    """One attempt on this node."""

    id: AttemptId
    link: RouterLink
    request: Request
    handed_over: bool  # there is a grant: the request goes on elsewhere after its first token
    clock: AttemptClock


class PrefillRole:
    """See node.role.Role."""

    name = Role.PREFILL
    transports: tuple[TransportAddress, ...] = ()  # receives nothing

    def __init__(self, shell: NodeShell) -> None:
        self.stats: TransferStats = shell.transfers
        self._shell = shell
        self._engine = shell.engine
        self._outbox = TokenOutbox()
        self._peers = PeerLinks(shell.me, self._from_decode_node, shell.context)
        self._transports = unit_senders(
            shell.config,
            shell.me,
            shell.built.pool,
            shell.context,
            self._way_lost,
            shell.built.device_pool,
        )
        self._sender = KVSender(
            memory=shell.built.memory,
            transports=self._transports,
            send=self._peers.send,
            on_ended=self._handoff_ended,
            model_fingerprint=shell.built.info.fingerprint,
            stats=self.stats,
            window_bytes=shell.config.window_bytes,
            max_sending_bytes=shell.built.max_sending_bytes,
        )
        self._work: dict[str, _Work] = {}  # by request: at most one attempt of each
        self._draining = False
        self._renew_every_s = shell.config.lease_ttl_s / 6
        self._next_renewal = 0.0

    @property
    def open_transfers(self) -> OpenTransfers:
        return {HANDOFFS_OPEN: self._sender.num_by_state()}

    @property
    def num_attempts(self) -> int:
        return len(self._work)

    def knows(self, id: AttemptId) -> bool:
        work = self._work.get(id.request)
        return id in self._outbox or (work is not None and work.id == id)

    # ------------------------------------------------------------ messages of routers

    def handle(self, link: RouterLink, message: Message) -> None:
        if isinstance(message, Prefill):
            self._start(link, message)
        elif isinstance(message, Abort):
            self._abort(message.id)
        elif isinstance(message, Resend):
            self._outbox.resend(message.id, message.index)
        elif isinstance(message, Ack):
            self._outbox.forget(message.id)

    def _start(self, link: RouterLink, message: Prefill) -> None:
        id = message.id
        older = self._work.get(id.request)
        if older is not None and older.id == id:
            return  # asked twice
        if older is not None and older.id.attempt > id.attempt:
            self._refuse(link, id, "superseded", "a later attempt is known", retryable=False)
            return
        self._abort(id)
        if self._draining:
            self._refuse(link, id, "drained", "the node is shutting down", retryable=True)
            return
        self._admit(link, message)

    def _admit(self, link: RouterLink, message: Prefill) -> None:
        id = message.id
        built = self._shell.built
        mistake = built.mistake(message.tokens, message.num_prompt_tokens, message.sampling)
        if mistake is not None:
            self._refuse(link, id, "invalid", mistake, retryable=False)
            return
        request = self._request(message)
        if message.pooling is not None and not built.model.can_embed:
            self._refuse(link, id, "invalid", "this model gives no embeddings", retryable=False)
            return
        num_tokens = request.num_tokens
        if num_tokens >= request.max_num_tokens or not built.can_hold(num_tokens):
            text = f"{num_tokens} tokens are more than this node can take"
            self._refuse(link, id, "too_long", text, retryable=False)
            return
        try:
            if message.grant is not None:
                self._sender.start(
                    id,
                    message.grant,
                    tokens=message.tokens,
                    cache_salt=message.cache_salt,
                    deadline_s=message.deadline_s,
                )
        except TransferError as error:
            self._refuse(link, id, error.cause, str(error), retryable=error.cause != "layout")
            return
        self._engine.layer_marks = self._sender.layer_marks
        clock = AttemptClock(time.monotonic())
        work = self._work[id.request] = _Work(id, link, request, message.grant is not None, clock)
        if request.pooling is None:
            self._outbox.open(id, link, base=request.num_output_tokens)
        try:
            self._engine.add(request)
        except CapacityError as error:
            self._fail(work, "capacity", str(error), retryable=True)
        except ValueError as error:
            self._fail(work, "internal", str(error), retryable=True)

    def _request(self, message: Prefill) -> Request:
        limit = message.num_prompt_tokens + message.sampling.max_tokens
        return Request(
            request_id=str(message.id),
            tokens=list(message.tokens),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            max_num_tokens=min(limit, self._shell.built.max_model_len),
            cache_salt=message.cache_salt,
            prefill_only=True,
            pooling=message.pooling,
        )

    def _abort(self, id: AttemptId) -> None:
        """End this attempt and any lower one of the request."""
        self._outbox.forget(id)
        work = self._work.get(id.request)
        if work is not None and work.id.attempt <= id.attempt:
            self._outbox.forget(work.id)
            self._drop(work, "revoked")

    # ------------------------------------------------------------ steps

    def on_step(self, result: StepResult) -> None:
        """First tokens leave first: to seal and send what is left takes longer than to say them."""
        now = time.monotonic()
        known = [(self._by_key(progress.request_id), progress) for progress in result.progress]
        works = [(work, progress) for work, progress in known if work is not None]
        for work, progress in works:
            work.clock.step_over(now, result.seconds)
            self._tell(work, progress)
        self._outbox.flush()
        for work, progress in works:
            if self._work.get(work.id.request) is work:  # else its router got lost a moment ago
                self._try_advance(work, partial(self._advance, work, progress))

    def _tell(self, work: _Work, progress: RequestProgress) -> None:
        """Queue the first token for the router, or send the embedding."""
        num_cached = progress.num_cached_tokens
        if progress.embedding is not None:
            self._shell.stats.count_lookup(work.request.num_tokens, num_cached)
            timing = work.clock.timing()
            work.link.send(Embedding(work.id, progress.embedding, num_cached, timing))
            self._drop(work, "finished")
        if not progress.new_tokens:
            return
        self._shell.stats.count_lookup(len(work.request.tokens) - 1, num_cached)
        if work.request.sampling.beam is not None:
            self._tell_search(work, progress)
            return
        self._outbox.add(
            work.id,
            progress.new_tokens,
            progress.finish_reason,
            num_cached,
            progress.logprobs,
            work.clock.timing(),
        )

    def _tell_search(self, work: _Work, progress: RequestProgress) -> None:
        """The prompt is computed: no token is chosen, unless the first step was the last."""
        timing = work.clock.timing()
        self._outbox.add(work.id, (), None, progress.num_cached_tokens, None, timing)
        self._outbox.flush()
        if progress.hypotheses:
            self._outbox.end_with(BeamsFound(work.id, progress.hypotheses))

    def on_layers(self, progress: LayerProgress) -> None:
        """The blocks of a step leave layer group by layer group, while the next ones compute."""
        for request_id, blocks in progress.finished_blocks:
            work = self._by_key(request_id)
            if work is not None and work.handed_over:
                advance = partial(
                    self._sender.blocks_finished, work.id, blocks, progress.num_layers
                )
                self._try_advance(work, advance)

    def _by_key(self, request_id: str) -> _Work | None:
        request, _, attempt = request_id.rpartition("/")
        work = self._work.get(request)
        return work if work is not None and work.id.attempt == int(attempt) else None

    def _try_advance(self, work: _Work, advance: Callable[[], None]) -> None:
        try:
            advance()
        except Exception as error:  # a bug met by one request must not end the others of the step
            log.exception("%s cannot go on", work.id)
            self._fail_those([work], "internal", f"the handoff cannot go on: {error}")

    def _advance(self, work: _Work, progress: RequestProgress) -> None:
        if work.handed_over:
            self._sender.blocks_finished(work.id, progress.finished_blocks)
        if self._work.get(work.id.request) is not work or not progress.new_tokens:
            return  # the handoff failed just now, or the prompt is not done yet
        if progress.finish_reason is not None:
            self._drop(work, "finished")
        elif work.handed_over:
            outputs = work.request.output_tokens
            self._sender.first_token(work.id, outputs, _of_all(progress.logprobs, len(outputs)))
        else:
            self._fail(work, "internal", "no grant, but the request goes on", retryable=True)

    # ------------------------------------------------------------ handoffs

    def _from_decode_node(self, sender: NodeId, message: Message) -> None:
        self._sender.handle(sender, message)

    def _way_lost(self, address: TransportAddress, error: TransferError) -> None:
        self._sender.lost(address, error)

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        """Nobody connects to a prefill node; decode nodes answer on its own links."""

    def _handoff_ended(self, handoff: Handoff) -> None:
        """Called once per handoff, whatever ended it."""
        self._engine.layer_marks = self._sender.layer_marks
        work = self._work.get(handoff.id.request)
        if work is None or work.id != handoff.id:
            return
        if handoff.state is HandoffState.DONE:
            if handoff.transfer is not None:
                work.link.send(HandoffDone(work.id, handoff.transfer))
            self._drop(work, "committed")
            self._outbox.forget(work.id)  # the decode node repeats all tokens
        else:
            self._fail(work, handoff.cause, f"the handoff ended: {handoff.cause}", retryable=True)

    # ------------------------------------------------------------ endings

    def _drop(self, work: _Work, cause: str) -> None:
        """Forget the attempt, free what it holds, and give its lease back for this `cause`."""
        self._free(work, partial(self._sender.abort, work.id, cause))

    def _free(self, work: _Work, end_handoff: Callable[[], None]) -> None:
        del self._work[work.id.request]
        end_handoff()
        key = work.request.request_id
        if not self._engine.abort(key):
            self._engine.release_held(key)

    def _fail(self, work: _Work, cause: str, message: str, *, retryable: bool) -> None:
        """The router hears of it, and may rebind the lease: it is not given back."""
        self._free(work, partial(self._sender.fail, work.id, cause))
        self._refuse(work.link, work.id, cause, message, retryable=retryable)

    def _refuse(
        self, link: RouterLink, id: AttemptId, cause: str, message: str, *, retryable: bool
    ) -> None:
        self._outbox.forget(id)
        link.send(AttemptFailed(id, cause, message[:4096], retryable))

    def fail(self, request_ids: Collection[str], cause: str, message: str) -> None:
        works = self._work.values()
        self._fail_those([w for w in works if w.request.request_id in request_ids], cause, message)

    def fail_all(self, cause: str, message: str) -> None:
        self._fail_those(list(self._work.values()), cause, message)

    def _fail_those(self, works: Iterable[_Work], cause: str, message: str) -> None:
        for work in works:
            if self._work.get(work.id.request) is work:  # else its router got lost a moment ago
                self._fail(work, cause, message, retryable=True)

    def router_lost(self, link: RouterLink) -> None:
        for work in [work for work in self._work.values() if work.link is link]:
            self._drop(work, "revoked")
        self._outbox.forget_router(link)

    def drain(self) -> None:
        self._draining = True

    def tick(self) -> None:
        self._sender.tick()
        self._outbox.expire()
        self._peers.close_idle()
        now = time.monotonic()
        if now >= self._next_renewal:
            self._next_renewal = now + self._renew_every_s
            self._sender.renew_leases()

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._peers.close()


def _of_all(logprobs: Logprobs | None, num_tokens: int) -> Logprobs | None:
    """Those of one new token, as those of all `num_tokens` that the decode node will repeat.

    Earlier attempts' tokens came without: the router has had their logprobs.
    """
    if logprobs is None or not logprobs.tokens:
        return logprobs
    return Logprobs((UNKNOWN,) * (num_tokens - 1) + logprobs.tokens, logprobs.prompt)
