"""What a fleet has done lately: sums over a window that moves with time. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tuner.online import Observation

MAX_REQUESTS = 100_000  # of one window; beyond, it becomes shorter


@dataclass(frozen=True, slots=True)
class _Arrival:
    at: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _End:
    at: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


class Observed:
    """Requests that came and requests that ended in the last `window_s` seconds.

    How long outputs get is known when they end: of those still running nothing is guessed, so
    after a change of the workload the outputs' mean follows later than the rate.
    """

    def __init__(self, window_s: float, began: float) -> None:
        self._window_s = window_s
        self._began = began
        self._arrivals: deque[_Arrival] = deque(maxlen=MAX_REQUESTS)
        self._ends: deque[_End] = deque(maxlen=MAX_REQUESTS)

    def arrived(self, now: float, prompt_tokens: int) -> None:
        """A request with so many prompt tokens; what a cache has of them is known at its end."""
        self._arrivals.append(_Arrival(now, prompt_tokens))

    def ended(
        self, now: float, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0
    ) -> None:
        """One that got its answer; those that failed say nothing about lengths."""
        self._ends.append(_End(now, prompt_tokens, output_tokens, cached_tokens))

    def look(self, now: float, num_prefill: int, num_decode: int) -> Observation:
        """The window that ends now."""
        begin = max(self._began, now - self._window_s)
        _forget(self._arrivals, begin)
        _forget(self._ends, begin)
        prompts = [one.prompt_tokens for one in self._arrivals]
        outputs = [one.output_tokens for one in self._ends]
        contexts = [one.prompt_tokens + one.output_tokens / 2 for one in self._ends]
        known = sum(one.prompt_tokens for one in self._ends)
        computed = 1 - sum(one.cached_tokens for one in self._ends) / max(1, known)
        since = self._arrivals[0].at if len(self._arrivals) == MAX_REQUESTS else begin
        return Observation(
            requests_per_s=len(prompts) / max(now - since, 1e-3),
            prompt_tokens=_mean(prompts) * computed,
            prompt_squares=_mean([tokens * tokens for tokens in prompts]) * computed,
            output_tokens=_mean(outputs),
            context_tokens=_mean(contexts) or _mean(prompts),
            num_requests=len(prompts),
            num_prefill=num_prefill,
            num_decode=num_decode,
        )


def _forget(window: deque[_Arrival] | deque[_End], begin: float) -> None:
    while window and window[0].at < begin:
        window.popleft()


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
