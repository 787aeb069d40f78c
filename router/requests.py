"""All choices that are being served: events from nodes in, effects out to nodes and clients.

This is where the pure parts meet: `Dispatch` decides, `Admission` orders, `Fleet` remembers, and
here their decisions become messages, text and metrics. Every call is synchronous: a token message
is logged, decoded and handed to its streams before the next one is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from router.admission import Admission
from router.breaker import OF_TRANSFERS, Pair
from router.choice import Choice
from router.deliveries import Deliveries
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
from router.errors import ApiError, server_error
from router.fleet import Fleet
from router.metrics import RouterMetrics
from router.pace import LivePace
from router.request_log import RequestLog
from telemetry import metrics as names
from telemetry.causes import known_cause
from tuner.observed import Observed
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    BeamsFound,
    Embedding,
    Granted,
    HandoffDone,
    Prefill,
    Refused,
    Tokens,
    TokenUpdate,
)
from wire.types import NodeId

log = logging.getLogger(__name__)


class Requests:
    """Serves choices over the fleet.

    Args:
        pace: is told what requests show of it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        admission: Admission[Choice],
        metrics: RouterMetrics,
        log: RequestLog,
        pace: LivePace,
        deliveries: Deliveries,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._admission = admission
        self._metrics = metrics
        self._log = log
        self._pace = pace
        self._deliveries = deliveries
        self._clock = clock
        self._choices: dict[str, Choice] = {}
        self.observed: Observed | None = None  # where a tuner looks

    def __len__(self) -> int:
        return len(self._choices)

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    # ------------------------------------------------------------ from clients

    def check_room(self, count: int) -> None:
        """Raise ApiError (429) if the queue has no room for `count` choices."""
        self._admission.check(count)

    def submit(self, choice: Choice) -> None:
        """Start a choice, or queue it."""
        self._choices[choice.work.request] = choice
        choice.dispatch.enter_queue(self._clock())
        if self.observed is not None:
            self.observed.arrived(self._clock(), choice.work.num_tokens)
        if choice.followers:
            choice.arrival = self._admission.new_arrival()
        if self._admission.enter(choice, choice.priority, choice.arrival):
            self._perform(choice, choice.dispatch.place(self._clock()))

    def cancel(self, choice: Choice) -> None:
        """Nobody waits for it any more; both nodes are told at once."""
        if choice.work.request in self._choices:
            self._perform(choice, choice.dispatch.cancel())
            self._forget(choice, "abort", self._clock())
            choice.metrics.finished(choice.work, choice.trace, 0)

    def fail_all(self, error: ApiError) -> None:
        """End everything (the router stops)."""
        for choice in list(self._choices.values()):
            if choice.work.request in self._choices:
                self._perform(choice, [*choice.dispatch.cancel(), Failed(error)])

    # ------------------------------------------------------------ from nodes

    def tokens(self, sender: NodeId, message: Tokens) -> None:
        """Everything that one step of a node produced for this router."""
        now = self._clock()
        for update in message.updates:
            choice = self._choices.get(update.id.request)
            if choice is None:
                self._answer_unknown(sender, update)
                continue
            try:
                self._take(choice, sender, update, now)
            except Exception:  # a bug met by one request must not cost the others their tokens
                log.exception("%s failed in the router", update.id)
                error = server_error("Internal error.", "internal_error")
                self._perform(choice, [*choice.dispatch.cancel(), Failed(error)])
        self._metrics.added.observe(self._clock() - now)

    def embedding(self, sender: NodeId, message: Embedding) -> None:
        """What one prompt gave."""
        choice = self._choices.get(message.id.request)
        if choice is None:
            return
        if message.id == choice.dispatch.id:
            choice.num_cached_tokens = min(message.num_cached_tokens, choice.work.num_tokens)
            choice.trace.embedded(message)
        self._perform(choice, choice.dispatch.embedding(sender, message, self._clock()))

    def beams_found(self, sender: NodeId, message: BeamsFound) -> None:
        """What one beam search gave."""
        choice = self._choices.get(message.id.request)
        if choice is None:
            self._deliveries.try_send(sender, Ack(message.id))
            return
        self._perform(choice, choice.dispatch.beams_found(sender, message, self._clock()))

    def _take(self, choice: Choice, sender: NodeId, update: TokenUpdate, now: float) -> None:
        if update.num_cached_tokens is not None and not choice.num_cached_tokens:
            choice.num_cached_tokens = min(update.num_cached_tokens, choice.work.num_tokens)
        if update.id == choice.dispatch.id:
            choice.trace.heard(update, sender == choice.dispatch.decode, now)
            if update.timing is not None and sender == choice.dispatch.prefill:
                num_cached, num_tokens = update.num_cached_tokens or 0, choice.work.num_tokens
                self._pace.prefilled(num_cached, num_tokens, update.timing.compute_s)
        self._perform(choice, choice.dispatch.tokens(sender, update, now))

    def _answer_unknown(self, sender: NodeId, update: TokenUpdate) -> None:
        """The choice is over: the node may forget it."""
        answer = Abort(update.id) if update.finish is None else Ack(update.id)
        self._deliveries.try_send(sender, answer)

    def granted(self, sender: NodeId, message: Granted) -> None:
        choice = self._choices.get(message.id.request)
        if choice is None:
            self._deliveries.try_send(sender, Abort(message.id))
            return
        now = self._clock()
        effects = choice.dispatch.granted(sender, message, now)
        if effects:
            self._metrics.grant_wait.observe(now - choice.trace.asked_at)
        self._perform(choice, effects)
        self.pump()

    def refused(self, sender: NodeId, message: Refused) -> None:
        self._metrics.reserve_refusals.labels(known_cause(message.cause)).inc()
        choice = self._choices.get(message.id.request)
        if choice is None:
            return
        if message.id == choice.dispatch.id and sender == choice.assigned.decode:
            choice.assigned.end(self._fleet)
        self._perform(choice, choice.dispatch.refused(sender, message, self._clock()))

    def attempt_failed(self, sender: NodeId, message: AttemptFailed) -> None:
        choice = self._choices.get(message.id.request)
        if choice is not None:
            log.info("%s failed on %s: %s", message.id, sender, message.message)
            self._perform(choice, choice.dispatch.attempt_failed(sender, message, self._clock()))

    def handoff_done(self, message: HandoffDone) -> None:
        transfer = message.transfer
        self._pace.handed_over(transfer.num_bytes, transfer.commit_wait_s)
        self._log.handoff_done(message)

    def node_lost(self, node: NodeId, alive: bool = False, cause: str = "node_lost") -> None:
        """Move everything that this node held; see Dispatch.node_lost."""
        now = self._clock()
        for choice in list(self._choices.values()):
            self._perform(choice, choice.dispatch.node_lost(node, now, alive, cause))
        self.pump()

    # ------------------------------------------------------------ time

    def tick(self) -> None:
        """Called a few times per second."""
        now = self._clock()
        for choice in list(self._choices.values()):
            self._perform(choice, choice.dispatch.tick(now))
        self.pump()

    def capacity_changed(self) -> None:
        """A node has told its load, or a new one is there."""
        self._admission.unblock()
        self.pump()

    def pump(self) -> None:
        """Let those in the queue ask who may."""
        now = self._clock()
        while (choice := self._admission.next(now)) is not None:
            self._perform(choice, choice.dispatch.place(now))

    # ------------------------------------------------------------ effects

    def _perform(self, choice: Choice, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Output():
                    self._output(choice, effect)
                case Embedded():
                    self._embedded(choice, effect)
                case Found():
                    self._found(choice, effect)
                case Send():
                    self._deliver(choice, effect)
                case NeedsCapacity():
                    choice.assigned.end(self._fleet)
                    choice.trace.waiting(self._clock())
                    self._admission.wait(choice, self._clock(), effect.retry_after_s)
                case AttemptEnded():
                    choice.assigned.end(self._fleet)
                    choice.trace.attempt_over(known_cause(effect.cause), self._clock())
                    self._metrics.attempts_ended.labels(known_cause(effect.cause)).inc()
                    self._judge(effect)
                case HandedOver():
                    if self._fleet.breaker.committed(effect.pair):
                        log.info("%s hands over to %s again", *effect.pair)
                case Taken():
                    self._admission.settle(choice)
                case Failed():
                    self._forget(choice, effect.error.code or "error", self._clock())
                    choice.listener.failed(effect.error)
        if choice.followers and choice.dispatch.shares_prompt:
            self._start_followers(choice)

    def _judge(self, over: AttemptEnded) -> None:
        """Blame the pair of an attempt for its end, if a transfer can be the reason."""
        if over.pair is None or over.cause not in OF_TRANSFERS or not self._alive(over.pair):
            return
        if self._fleet.breaker.failed(over.pair, self._clock()):
            why = "handoffs from %s to %s fail (%s): others are preferred for a while"
            log.warning(why, *over.pair, over.cause)

    def _alive(self, pair: Pair) -> bool:
        return all(node in self._fleet for node in pair)

    def _output(self, choice: Choice, output: Output) -> None:
        now = self._clock()
        gap = choice.trace.output(len(output.tokens), now)
        choice.metrics.observe(names.INTER_TOKEN_LATENCY, gap)
        choice.assigned.prompt_done(self._fleet)
        text = choice.text.push(output.tokens, output.finish, output.rows)
        finish = choice.text.finish
        if finish is not None:
            self._perform(choice, choice.dispatch.cancel())  # a stop string ends it before its node
            self._forget(choice, finish.value, now)
            choice.metrics.finished(choice.work, choice.trace, choice.num_cached_tokens)
            self._observe_end(choice, now)
        choice.listener.produced(choice, text)
        if finish is not None:
            self._start_followers(choice)

    def _observe_end(self, choice: Choice, now: float) -> None:
        self._pace.streamed(choice.trace.num_output_tokens - 1, choice.trace.timeline.decode_s)
        if self.observed is not None:
            trace = choice.trace
            later = trace.num_output_tokens - 1
            decode_s = trace.timeline.decode_s
            self.observed.ended(
                now,
                choice.work.num_tokens,
                trace.num_output_tokens,
                choice.num_cached_tokens,
                ttft_s=trace.timeline.time_to_first_token_s,
                tpot_s=decode_s / later if decode_s is not None and later > 0 else None,
            )

    def _embedded(self, choice: Choice, embedded: Embedded) -> None:
        now = self._clock()
        choice.trace.output(0, now)
        choice.embedding = embedded.vector
        self._forget(choice, "stop", now)
        choice.metrics.finished(choice.work, choice.trace, choice.num_cached_tokens)
        choice.listener.produced(choice, "")

    def _found(self, choice: Choice, found: Found) -> None:
        """All choices of the prompt have their text at once."""
        now = self._clock()
        answered = list(zip([choice, *choice.beams], found.hypotheses, strict=False))
        texts = [each.text.push(h.tokens, h.finish, ()) for each, h in answered]
        choice.trace.output(0, now)
        self._forget(choice, found.hypotheses[0].finish.value, now)
        choice.metrics.finished(choice.work, choice.trace, choice.num_cached_tokens)
        others = sum(each.text.num_tokens for each in choice.beams)
        choice.metrics.count(names.GENERATION_TOKENS, others)
        for (each, hypothesis), text in zip(answered, texts, strict=True):
            each.trace.num_output_tokens = each.text.num_tokens
            each.trace.ended(hypothesis.finish.value, now)
            each.listener.produced(each, text)

    def _start_followers(self, choice: Choice) -> None:
        """Each keeps its own attempts and its own log; what they share are blocks."""
        followers, choice.followers = choice.followers, []
        for follower in followers:
            follower.arrival = choice.arrival
            follower.dispatch.follow(choice.dispatch)
            self.submit(follower)

    def _deliver(self, choice: Choice, send: Send) -> None:
        if isinstance(send.message, Prefill):
            self._admission.settle(choice)
        if not self._deliveries.deliver(choice, send.to, send.message):
            self._fleet.mark_unreachable(send.to)
            self._perform(choice, choice.dispatch.cannot_send(send.to, self._clock()))

    def _forget(self, choice: Choice, end: str, now: float) -> None:
        """Somebody else may have room now."""
        choice.trace.num_output_tokens = choice.text.num_tokens  # a stop string drops some
        choice.trace.ended(end, now)
        if self._choices.pop(choice.work.request, None) is not None:
            choice.assigned.end(self._fleet)
            self._admission.leave(choice)
