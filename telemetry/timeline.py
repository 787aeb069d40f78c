"""The timeline of one choice; every latency metric is a difference on it.

arrived ── queue ──▶ dispatched ── prefill ──▶ first token ── decode ──▶ ended
        └───────────── time to first token ──────────▶│
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Timeline:
    """Monotonic seconds; None: not reached."""

    arrived: float
    dispatched: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def mark_dispatched(self, now: float) -> None:
        if self.dispatched is None:
            self.dispatched = now

    def mark_tokens(self, now: float) -> float | None:
        """Note a message with tokens; returns the time since the previous one."""
        previous, self.last_token = self.last_token, now
        if previous is None:
            self.first_token = now
            return None
        return now - previous

    @property
    def queue_s(self) -> float | None:
        return _between(self.arrived, self.dispatched)

    @property
    def time_to_first_token_s(self) -> float | None:
        return _between(self.arrived, self.first_token)

    @property
    def prefill_s(self) -> float | None:
        return _between(self.dispatched, self.first_token)

    @property
    def decode_s(self) -> float | None:
        return _between(self.first_token, self.last_token)

    @property
    def inference_s(self) -> float | None:
        return _between(self.dispatched, self.last_token)

    @property
    def total_s(self) -> float | None:
        return _between(self.arrived, self.last_token)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)
