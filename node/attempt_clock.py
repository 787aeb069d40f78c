"""Where the time of one attempt went on this node; told to the router with the first token."""

from __future__ import annotations

from dataclasses import dataclass

from wire.request_messages import PrefillTiming


@dataclass(slots=True)
class AttemptClock:
    """Times are monotonic seconds of this node; only differences leave it."""

    heard: float
    began: float | None = None
    last: float = 0.0
    num_steps: int = 0

    def step_over(self, now: float, seconds: float) -> None:
        """A step that computed part of the prompt has taken `seconds` until now."""
        if self.began is None:
            self.began = max(self.heard, now - seconds)
        self.last = now
        self.num_steps += 1

    def timing(self) -> PrefillTiming:
        began = self.heard if self.began is None else self.began
        compute_s = max(0.0, self.last - began)
        return PrefillTiming(began - self.heard, compute_s, self.num_steps)
