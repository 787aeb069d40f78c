"""What one handoff's transfer was like: sizes and times, for metrics only. Decides nothing.

first unit        last forward pass over    first token known            Committed
    ├─── while the next chunk computes ─┼─ tail ────┼──── commit wait ────────┤
    └────────────────────────────── seconds ──────────────────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.request_messages import TransferRecord


@dataclass(slots=True)
class TransferMeter:
    """Time is an argument, in seconds. Bytes count when a transport has taken them."""

    transport: str = ""
    num_units: int = 0
    num_bytes: int = 0
    first_sent: float | None = None
    computed: float | None = None  # when the last of the forward passes was over, so far
    early_bytes: int = 0  # and what had left by then
    known: float | None = None  # when the first token was known

    def sent(self, num_bytes: int, transport: str, now: float) -> None:
        """A unit was given to `transport`."""
        if self.first_sent is None:
            self.first_sent = now
        self.transport = transport
        self.num_units += 1
        self.num_bytes += num_bytes

    def pass_over(self, now: float) -> None:
        """A forward pass is over, and what it finished is about to leave; the last call counts."""
        self.computed, self.early_bytes = now, self.num_bytes

    def first_token(self, now: float) -> None:
        self.known = now

    def record(self, now: float) -> TransferRecord:
        """The decode node has just said that it owns the request."""
        return TransferRecord(
            transport=self.transport,
            num_units=self.num_units,
            num_bytes=self.num_bytes,
            seconds=_since(self.first_sent, now),
            tail_bytes=self.num_bytes - self.early_bytes,
            tail_s=_since(self.computed, now),
            commit_wait_s=_since(self.known, now),
        )


def _since(start: float | None, now: float) -> float:
    return 0.0 if start is None else max(0.0, now - start)
