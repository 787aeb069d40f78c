"""Messages to nodes: what the router remembers of those that begin some work, and the sending."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from router.breaker import Pair
from router.choice import Choice
from router.fleet import Fleet
from router.metrics import RouterMetrics
from router.node_chooser import NodeChooser
from wire.errors import WireError
from wire.messages import Message
from wire.request_messages import Generate, Prefill, Rebind, Reserve
from wire.types import NodeId

log = logging.getLogger(__name__)


class Deliveries:
    """Sends what a choice asks of nodes, and notes it in its trace, the fleet and the metrics.

    Args:
        send: queues a message for a node; raises WireError.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        fleet: Fleet,
        chooser: NodeChooser,
        metrics: RouterMetrics,
        send: Callable[[NodeId, Message], None],
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._chooser = chooser
        self._metrics = metrics
        self._send = send
        self._clock = clock

    def deliver(self, choice: Choice, to: NodeId, message: Message) -> bool:
        """Whether the node will get it."""
        self._note(choice, to, message)
        return self.try_send(to, self._with_layout(message))

    def try_send(self, to: NodeId, message: Message) -> bool:
        """The same for what needs no memory."""
        try:
            self._send(to, message)
        except WireError as error:
            log.warning("%s", error)
            return False
        return True

    def _with_layout(self, message: Message) -> Message:
        """A reservation tells how the blocks will come."""
        if not isinstance(message, Reserve | Rebind) or message.prefill not in self._fleet:
            return message
        return replace(message, prefill_layout=self._fleet[message.prefill].info.layout)

    # ------------------------------------------------------------ what is remembered

    def _note(self, choice: Choice, to: NodeId, message: Message) -> None:
        match message:
            case Reserve():
                self._note_reservation(choice, to, message, len(message.tokens))
            case Rebind():
                self._metrics.rebinds.inc()
                num_tokens = choice.work.num_tokens + len(message.output_tokens)
                self._note_reservation(choice, to, message, num_tokens)
            case Prefill():
                choice.trace.prefilling(message.id.attempt, to, self._clock())
                self._computes(choice, to, len(message.tokens))
            case Generate():
                self._note_offer(choice, to, message)

    def _note_reservation(
        self, choice: Choice, node: NodeId, message: Reserve | Rebind, num_tokens: int
    ) -> None:
        now = self._clock()
        self._fleet.breaker.began(Pair(message.prefill, node), now)
        choice.trace.reserving(message.id.attempt, message.prefill, node, now)
        self._note_verdict(choice, "handoff")
        self._metrics.attempts.inc()
        choice.assigned.answers(self._fleet, node, counted=isinstance(message, Rebind))
        self._computes(choice, message.prefill, num_tokens)

    def _note_offer(self, choice: Choice, node: NodeId, message: Generate) -> None:
        now, verdict = self._clock(), choice.dispatch.verdict
        choice.trace.offering(message.id.attempt, node, now)
        self._note_verdict(choice, "in_place")
        if verdict is not None:
            self._chooser.taken(node, verdict.taken_s, now)
        self._metrics.attempts.inc()
        choice.assigned.answers(self._fleet, node)
        self._computes(choice, node, len(message.tokens))

    def _note_verdict(self, choice: Choice, way: str) -> None:
        """Once per choice of nodes: a reservation may be asked of several."""
        attempt, verdict = choice.trace.attempt, choice.dispatch.verdict
        if attempt is None or verdict is None or attempt.verdict is verdict:
            return
        attempt.verdict = verdict
        self._metrics.ways.labels(way, verdict.reason.value).inc()

    def _computes(self, choice: Choice, node: NodeId, num_tokens: int) -> None:
        choice.assigned.computes(self._fleet, node, num_tokens, choice.dispatch.near)
