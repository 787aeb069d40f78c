"""What remains of ended attempts: bounded tombstones, so that a question gets its answer again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What remains of an ended attempt."""

    attempt: int
    lease: int  # 0: it never had one
    committed: bool
    cause: str
    at: float


class Outcomes:
    """The last outcome of each request, the oldest first.

    Args:
        memory_s: how long they are remembered; longer than anybody retries.
        max_outcomes: and how many at most.
    """

    def __init__(self, memory_s: float, max_outcomes: int) -> None:
        self._memory_s = memory_s
        self._max_outcomes = max_outcomes
        self._by_request: OrderedDict[str, Outcome] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_request)

    def of(self, request: str) -> Outcome | None:
        """The outcome of its newest attempt that has ended."""
        return self._by_request.get(request)

    def remember(self, request: str, outcome: Outcome) -> None:
        """Take the place of the request's older one."""
        self._by_request[request] = outcome
        self._by_request.move_to_end(request)
        while self._by_request and self._oldest_is_forgettable(outcome.at):
            self._by_request.popitem(last=False)

    def _oldest_is_forgettable(self, now: float) -> bool:
        oldest = next(iter(self._by_request.values()))
        return len(self._by_request) > self._max_outcomes or oldest.at < now - self._memory_s
