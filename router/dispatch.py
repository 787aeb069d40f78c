"""One choice on its way over the fleet: a pure state machine.

    WAITING ─place─▶ RESERVING ─granted─▶ PREFILLING ─decode node speaks─▶ DECODING ─finish─▶ ENDED
       ▲                │ refused by all    ▲  │                              │
       │                │           granted │  │ prefill node fails           │
       │                │◀── refused ── REBINDING                             │
       ├────────────────┴── attempt ended: node lost, failure, divergence ────┤
       └─ place in place ─▶ OFFERING ─the node speaks─▶ GENERATING ─finish─▶ ENDED

An attempt that ends because of its prefill node leaves blocks reserved on a decode node that is
well: REBINDING asks that one to go on with another prefill node in the same room, instead of
reserving anew behind everybody else.

A request that one node serves alone is offered to it, and the node answers at once, by tokens
(perhaps none) or by a refusal; from then on it is all there is to the attempt.

Events come in as calls with the time as an argument; what is to be done comes out as a list of
effects. The log's tokens survive every attempt: the next one continues after the last logged token.
With one token left to sample nothing is reserved, and the prefill node ends the choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from router import errors
from router.attempt_messages import Asking
from router.breaker import Pair
from router.effects import (
    AttemptEnded,
    Effect,
    Embedded,
    Failed,
    Found,
    HandedOver,
    NeedsCapacity,
    Output,
    Send,
    Taken,
)
from router.errors import ApiError
from router.failures import Failures, final_error
from router.phase import ASKING, ON_NODES, WORKING, Phase
from router.placement import Handoff, InPlace, Nowhere, Place, Placer
from router.policy import Wishes
from router.token_log import Accepted, Divergence, Gap, TokenLog
from router.way import Verdict
from router.work import Work
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    BeamsFound,
    Embedding,
    Grant,
    Granted,
    Refused,
    Resend,
    TokenUpdate,
)
from wire.types import AttemptId, FinishReason, NodeId

# A prefill node's own failures; others end the lease too, and there is nothing left to rebind.
_OF_PREFILL_NODE = frozenset({"capacity", "drained", "internal", "transport"})


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How long a choice may wait, in seconds."""

    request_s: float = 600.0
    queue_s: float = 30.0
    reserve_s: float = 5.0
    silence_s: float = 10.0  # without a token for so long: ask the decode node to repeat


class Dispatch:
    """The attempts of one choice and what they have produced."""

    def __init__(self, work: Work, placer: Placer, limits: DispatchLimits, now: float) -> None:
        self.work = work
        self.log = TokenLog.of(work)
        self.phase = Phase.WAITING
        self.prefill: NodeId | None = None  # None: the prompt is computed where it is answered
        self.decode: NodeId | None = None
        self.id = AttemptId(work.request, 0)  # the current attempt; the first is 1
        self._lease = 0  # what the decode node has granted; 0: nothing
        self._author: NodeId | None = None  # of the newest tokens in the log
        self._numerics = ""  # of the author: it would sample them again
        self._placer = placer
        self._limits = limits
        self._deadline = now + limits.request_s
        self._waiting_since = now
        self._asking_since = now
        self._last_heard = now
        self._last_word = "No node is free to serve the request."
        self._failures = Failures()
        self._refused: set[NodeId] = set()  # in this round
        self._too_small: set[NodeId] = set()  # that can never hold it
        self.verdict: Verdict | None = None  # why the attempt is where it is
        self.near: frozenset[NodeId] = frozenset()  # where its prompt is, as far as is known here

    # ------------------------------------------------------------ forward

    def enter_queue(self, now: float) -> None:
        """Its time to wait begins now, not when it was made."""
        self._waiting_since = now

    def follow(self, first: Dispatch) -> None:
        """`first` has the same prompt, and has left its blocks where it was.

        Its request is being answered already, so lack of room makes this one wait, not fail.
        """
        self.near = frozenset(n for n in (first.prefill, first.decode) if n is not None)
        self._limits = replace(self._limits, queue_s=self._limits.request_s)

    def place(self, now: float) -> list[Effect]:
        """Begin an attempt, if there are nodes for it."""
        assert self.phase is Phase.WAITING
        self._refused = set(self._too_small)
        place = self._choose_place(now)
        if isinstance(place, Nowhere):
            return self._wait(place.reason, 1.0)
        self._begin_attempt()
        return self._ask(place, now)

    def _choose_place(self, now: float) -> Place | Nowhere:
        one_token = self._num_left == 1
        return self._placer.place(self.work, self._wishes(now), self._refused, one_token=one_token)

    def _ask(self, place: Place, now: float) -> list[Effect]:
        """Ask the first of the nodes that this attempt has now."""
        self.verdict = place.verdict
        if isinstance(place, InPlace):
            return self._offer(place.node, now)
        self.prefill, self.decode = place.prefill, place.decode
        if self.decode is None:
            return self._prefill(self.prefill, None, now)
        return self._reserve(self.decode, self.prefill, now)

    def granted(self, sender: NodeId, message: Granted, now: float) -> list[Effect]:
        """The decode node holds blocks: the prefill may begin."""
        if self.phase not in ASKING or not self._is_from(sender, message.id):
            return []
        if self.prefill is None:
            return []  # nothing was to be reserved
        return self._prefill(self.prefill, message.grant, now)

    def refused(self, sender: NodeId, message: Refused, now: float) -> list[Effect]:
        """The node has no room, or nothing to rebind: ask the next one, or wait.

        What one node can never hold another one may: pools differ, and a node whose pool is small
        may have become a decode node since the request was let in.
        """
        if self.phase not in ASKING or not self._is_from(sender, message.id):
            return []
        if message.cause == "invalid":
            return self._fail(errors.bad_request(message.message))
        if message.cause == "too_long":
            self._too_small.add(sender)
        if message.cause != "gone":  # a new reservation may well succeed there
            self._refused.add(sender)
        place = self._place_after_refusal(now)
        if not isinstance(place, Nowhere):
            return self._ask(place, now)
        if message.cause == "too_long" and self._refused <= self._too_small:
            return self._fail(errors.bad_request(message.message, code="context_length_exceeded"))
        return self._wait(f"No capacity: {message.message}", message.retry_after_s)

    def _place_after_refusal(self, now: float) -> Place | Nowhere:
        """Another node in the refusing one's stead; who computes the prompt has been chosen."""
        if self.prefill is None:
            return self._choose_place(now)
        wishes = self._wishes(now)
        decode = self._placer.pick_decode(self.work, self.prefill, wishes, self._refused)
        return Nowhere("") if decode is None else Handoff(self.prefill, decode)

    def tokens(self, sender: NodeId, update: TokenUpdate, now: float) -> list[Effect]:
        """New output tokens from either node of the attempt."""
        if self.phase not in WORKING or not self._is_from(sender, update.id):
            return []
        if update.finish is FinishReason.ABORT:
            return self._attempt_over("aborted", now)
        if self.work.pooling is not None:  # from a node that does not know of embeddings
            return self._attempt_over("divergence", now)
        effects = self._taken_over() if sender == self.decode else []
        self._last_heard = now
        if self.work.sampling.beam is not None:
            return effects  # a search has no tokens before its end
        verdict = self.log.accept(
            update.id.attempt, update.index, update.tokens, update.finish, update.logprobs
        )
        match verdict:
            case Accepted():
                return effects + self._output(sender, verdict)
            case Gap(resend_from=index):
                return [*effects, Send(sender, Resend(update.id, index))]
            case Divergence():
                return effects + self._attempt_over("divergence", now)

    def _taken_over(self) -> list[Effect]:
        """A decode node speaks when it has verified what came, or has taken an offer."""
        if self.phase is Phase.OFFERING:
            self.phase = Phase.GENERATING
            return [Taken()]
        if self.phase is not Phase.PREFILLING or self._pair is None:
            return []
        self.phase = Phase.DECODING
        return [HandedOver(self._pair)]

    def embedding(self, sender: NodeId, message: Embedding, now: float) -> list[Effect]:
        """What was asked for instead of tokens."""
        wanted = self.phase is Phase.PREFILLING and self.work.pooling is not None
        if not wanted or not self._is_from(sender, message.id):
            return []
        if not message.vector or len(message.vector) % 4:
            return self._attempt_over("divergence", now)
        self.phase = Phase.ENDED
        return [Embedded(message.vector)]

    def beams_found(self, sender: NodeId, message: BeamsFound, now: float) -> list[Effect]:
        """What was searched for."""
        beam = self.work.sampling.beam
        if self.phase not in WORKING or beam is None or not self._is_from(sender, message.id):
            return []
        if len(message.hypotheses) < beam.width:
            return self._attempt_over("divergence", now)
        effects = self._taken_over() if sender == self.decode else []
        self.phase = Phase.ENDED
        return [*effects, Send(sender, Ack(self.id)), Found(message.hypotheses)]

    def _output(self, sender: NodeId, new: Accepted) -> list[Effect]:
        if new.tokens and sender != self._author:
            self._author, self._numerics = sender, self._placer.numerics_of(sender)
        output = Output(new.tokens, new.finish, new.rows)
        if new.finish is None:
            return [output] if new.tokens else []
        acks: list[Effect] = []
        if self.phase in (Phase.DECODING, Phase.GENERATING) and self.decode is not None:
            acks.append(Send(self.decode, Ack(self.id)))
        self.phase = Phase.ENDED
        return [*acks, output]

    # ------------------------------------------------------------ what goes wrong

    def attempt_failed(self, sender: NodeId, message: AttemptFailed, now: float) -> list[Effect]:
        """A node gave up. The prefill node's word counts until the decode node has taken over."""
        if self.phase not in ON_NODES or not self._is_from(sender, message.id):
            return []
        if self.phase is Phase.DECODING and sender != self.decode:
            return []
        self._last_word = message.message
        if message.cause == "internal":
            self._failures.avoid.add(sender)  # it, or the request: another node will tell
        if message.retryable:
            own = sender == self.prefill and message.cause in _OF_PREFILL_NODE
            return self._attempt_over(message.cause, now, failed=sender if own else None)
        return self._fail(final_error(message))

    def node_lost(
        self, node: NodeId, now: float, alive: bool = False, cause: str = "node_lost"
    ) -> list[Effect]:
        """A node died, or (`alive`) has stalled or forgotten what it did.

        Only work on it counts as a death that the request may have caused; and not where the node
        has left in order (`cause`), while what it was sent last was still on the way.
        """
        if not self._depends_on(node):
            return []
        self._last_word = f"node {node.name} was lost"
        cause = "reserve_lost" if self.phase in ASKING else cause
        return self._attempt_over(cause, now, unreachable=None if alive else node, failed=node)

    def cannot_send(self, node: NodeId, now: float) -> list[Effect]:
        """A message to this node could not be sent."""
        if not self._depends_on(node):
            return []
        self._last_word = f"node {node.name} does not take messages"
        self._failures.avoid.add(node)
        return self._attempt_over("unreachable", now, unreachable=node, failed=node)

    def cancel(self) -> list[Effect]:
        """Nobody waits for this choice any more."""
        aborts = self._aborts(None)
        self.phase = Phase.ENDED
        return aborts

    def tick(self, now: float) -> list[Effect]:
        """Called regularly: whatever is overdue."""
        if self.phase is Phase.ENDED:
            return []
        if now >= self._deadline:
            message = "The request took longer than this server allows."
            return self._fail(errors.server_error(message, "timeout", status=504))
        if self.phase is Phase.WAITING and now - self._waiting_since > self._limits.queue_s:
            return self._fail(errors.unavailable(self._last_word, "no_capacity", 5.0))
        if self.phase in ASKING and now - self._asking_since > self._limits.reserve_s:
            assert self.decode is not None
            self._last_word = f"node {self.decode.name} does not answer"
            self._failures.avoid.add(self.decode)
            return self._attempt_over("reserve_timeout", now)
        return self._ask_after_silence(now)

    def _ask_after_silence(self, now: float) -> list[Effect]:
        """A lost connection loses messages: what the decode node sent may have to be repeated."""
        silent = now - self._last_heard > self._limits.silence_s
        alone = self.phase is Phase.GENERATING
        expects = alone or bool(self.log.tokens) or self.work.sampling.beam is not None
        if not silent or self.decode is None or not expects or self.phase not in ON_NODES:
            return []
        self._last_heard = now
        return [Send(self.decode, Resend(self.id, len(self.log.tokens)))]

    # ------------------------------------------------------------ parts

    @property
    def shares_prompt(self) -> bool:
        """Whether its nodes have the prompt's blocks, so that other choices may follow."""
        generates = self.phase is Phase.GENERATING and bool(self.log.tokens)
        return self.phase is Phase.DECODING or generates

    @property
    def _num_left(self) -> int:
        return self.work.sampling.max_tokens - len(self.log.tokens)

    def _is_from(self, sender: NodeId, attempt: AttemptId) -> bool:
        return attempt == self.id and sender in (self.prefill, self.decode)

    def _depends_on(self, node: NodeId) -> bool:
        if self.phase is Phase.DECODING:
            return node == self.decode
        return self.phase in ON_NODES and node in (self.prefill, self.decode)

    @property
    def _pair(self) -> Pair | None:
        """Who hands over to whom in this attempt."""
        if self.prefill is None or self.decode is None:
            return None
        return Pair(self.prefill, self.decode)

    def _wishes(self, now: float) -> Wishes:
        failures, num_output = self._failures, len(self.log.tokens)
        return Wishes(failures.avoid, failures.pairs, self._numerics, now, self.near, num_output)

    def _begin_attempt(self) -> None:
        self.id = AttemptId(self.work.request, self.id.attempt + 1)
        self.log.begin_attempt(self.id.attempt)

    def _asking(self, now: float) -> Asking:
        return Asking(self.id, self.work, self.log.tokens, self._deadline - now)

    def _reserve(self, decode: NodeId, prefill: NodeId, now: float) -> list[Effect]:
        self.phase = Phase.RESERVING
        self._asking_since = now
        return [Send(decode, self._asking(now).reserve(prefill))]

    def _offer(self, node: NodeId, now: float) -> list[Effect]:
        self.prefill, self.decode = None, node
        self.phase = Phase.OFFERING
        self._asking_since = self._last_heard = now
        return [Send(node, self._asking(now).generate())]

    def _prefill(self, prefill: NodeId, grant: Grant | None, now: float) -> list[Effect]:
        self.phase = Phase.PREFILLING
        self._lease = 0 if grant is None else grant.lease
        self._last_heard = now
        return [Send(prefill, self._asking(now).prefill(grant))]

    def _wait(self, reason: str, retry_after_s: float) -> list[Effect]:
        """Back to the queue; its time limit goes on from where it was."""
        self.phase = Phase.WAITING
        self._last_word = reason
        return [NeedsCapacity(retry_after_s)]

    def _attempt_over(
        self,
        cause: str,
        now: float,
        unreachable: NodeId | None = None,
        failed: NodeId | None = None,
    ) -> list[Effect]:
        """End the attempt on its nodes and begin the next, unless too much went wrong.

        Args:
            failed: the node that failed, where that is known; the other one is well.
        """
        over = AttemptEnded(cause, self._pair)
        self._failures.count(cause, self._pair)
        if self._failures.hopeless:
            aborts = self._aborts(unreachable)
            self.phase = Phase.ENDED
            message = f"The request failed {self.id.attempt} times, at last: {self._last_word}"
            return [over, *aborts, Failed(errors.server_error(message, cause))]
        successor = self._successor(failed, now)
        if successor is not None:
            aborts = self._aborts(unreachable, self.decode)
            return [over, *self._rebind(successor, now), *aborts]
        aborts = self._aborts(unreachable)
        self.phase = Phase.WAITING
        self._waiting_since = now
        return [over, *aborts, *self.place(now)]

    def _successor(self, failed: NodeId | None, now: float) -> NodeId | None:
        """Who goes on under the reservation of the prefill node that failed, if that can be."""
        reserved = self.phase is Phase.PREFILLING and self._lease and self.decode is not None
        if failed is None or failed != self.prefill or not reserved or self._num_left == 1:
            return None
        wishes = self._wishes(now)
        wishes = replace(wishes, avoid={*wishes.avoid, failed})
        return self._placer.pick_prefill(self.work, wishes, self.decode)

    def _rebind(self, prefill: NodeId, now: float) -> list[Effect]:
        assert self.decode is not None
        self._refused = set(self._too_small)
        self.prefill = prefill
        self._begin_attempt()
        self.phase = Phase.REBINDING
        self._asking_since = now
        return [Send(self.decode, self._asking(now).rebind(self._lease, prefill))]

    def _fail(self, error: ApiError) -> list[Effect]:
        return [*self.cancel(), Failed(error)]

    def _aborts(self, *spared: NodeId | None) -> list[Effect]:
        """Tell the attempt's nodes, but for those that cannot hear it or are told otherwise."""
        if self.phase not in ON_NODES:
            return []
        nodes = dict.fromkeys(node for node in (self.prefill, self.decode) if node is not None)
        return [Send(node, Abort(self.id)) for node in nodes if node not in spared]
