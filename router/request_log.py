"""The requests of now and of a moment ago, for `/debug/requests`; bounded, and without text."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from router.trace import RUNNING, ChoiceTrace
from wire.request_messages import HandoffDone


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One client request."""

    id: str  # without the prefix that the response's id has
    response_id: str
    model: str
    stream: bool
    arrived_at: float  # Unix time
    choices: list[ChoiceTrace] = field(default_factory=list)

    @property
    def running(self) -> bool:
        return any(choice.end == RUNNING for choice in self.choices)

    @property
    def first(self) -> ChoiceTrace | None:
        """The choice whose first token came first."""
        begun = [choice for choice in self.choices if choice.timeline.first_token is not None]
        return min(begun, key=lambda choice: choice.timeline.first_token or 0, default=None)


class RequestLog:
    """Args:
    limit: choices of finished requests that are kept (0: nothing is, running ones neither).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[str, RequestRecord] = {}
        self._finished: OrderedDict[str, RequestRecord] = OrderedDict()
        self._num_finished = 0  # choices

    @property
    def enabled(self) -> bool:
        return self._limit > 0

    def begin(self, record: RequestRecord) -> None:
        if self.enabled:
            self._running[record.id] = record

    def finish(self, record: RequestRecord, now: float) -> None:
        """The request is over; the oldest ones make room."""
        for choice in record.choices:
            choice.ended("abort", now)  # those that never began
        if self._running.pop(record.id, None) is None:
            return
        self._finished[record.id] = record
        self._num_finished += len(record.choices)
        while self._num_finished > self._limit:
            _, oldest = self._finished.popitem(last=False)
            self._num_finished -= len(oldest.choices)

    def find(self, name: str) -> tuple[RequestRecord, int | None] | None:
        """By the response's id, or that of a choice: `…-0`; with the choice's index then."""
        known = name.rpartition("chatcmpl-")[2].rpartition("cmpl-")[2]
        id, _, index = known.partition("-")
        record = self._running.get(id) or self._finished.get(id)
        if record is None:
            return None
        if not index:
            return record, None
        chosen = index.isascii() and index.isdigit() and int(index) < len(record.choices)
        return (record, int(index)) if chosen else None

    def all(self) -> list[RequestRecord]:
        """Running ones first, then the finished ones; the latest first."""
        return [*reversed(self._running.values()), *reversed(self._finished.values())]

    def handoff_done(self, message: HandoffDone) -> None:
        found = self.find(message.id.request)
        if found is not None and found[1] is not None:
            found[0].choices[found[1]].transferred(message.id.attempt, message.transfer)
