"""What a fleet has done lately: sums over a window that moves with time. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from tuner.online import Observation

MAX_REQUESTS = 100_000  # of one window; beyond, it becomes shorter
RECENT_S = 5.0  # is looked at, or as long as it takes for
ENOUGH = 30  # requests: then their rate is known within a fifth


@dataclass(frozen=True, slots=True)
class Standing:
    """A fleet's nodes, and what is on them now."""

    num_prefill: int  # serving nodes
    num_decode: int
    queued_tokens: int = 0  # of prompts, not computed yet
    num_decoding: int = 0  # requests on decode nodes
    num_seats: int = 0  # requests that a node decodes at once, at most; 0: no bound
    kv_tokens: int = 0  # that a node holds; 0: no bound


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
    ttft_s: float
    tpot_s: float


Event = TypeVar("Event", _Arrival, _End)


class Observed:
    """Requests that came and requests that ended lately.

    That is the last RECENT_S seconds, or so many more as it takes for ENOUGH requests, but at most
    the last `window_s`: a change of the workload is to be seen soon, and noise is not.

    How long outputs get is known when they end: of those still running nothing is guessed, but
    how many they are tells of a change before the first of them ends.
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
        self,
        now: float,
        prompt_tokens: int,
        output_tokens: int,
        cached_tokens: int = 0,
        *,
        ttft_s: float | None = None,
        tpot_s: float | None = None,
    ) -> None:
        """One that got its answer; those that failed say nothing about lengths."""
        took = (ttft_s or 0.0, tpot_s or 0.0)
        self._ends.append(_End(now, prompt_tokens, output_tokens, cached_tokens, *took))

    def look(self, now: float, fleet: Standing) -> Observation:
        """The time that ends now."""
        begin = max(self._began, now - self._window_s)
        _forget(self._arrivals, begin)
        _forget(self._ends, begin)
        since, arrivals = _recent(self._arrivals, begin, now)
        ends_since, ends = _recent(self._ends, begin, now)
        prompts = [one.prompt_tokens for one in arrivals]
        outputs = [one.output_tokens for one in ends]
        contexts = [one.prompt_tokens + one.output_tokens / 2 for one in ends]
        known = sum(one.prompt_tokens for one in ends)
        computed = 1 - sum(one.cached_tokens for one in ends) / max(1, known)
        return Observation(
            requests_per_s=len(prompts) / max(now - since, 1e-3),
            answers_per_s=len(ends) / max(now - ends_since, 1e-3),
            prompt_tokens=_mean(prompts) * computed,
            prompt_squares=_mean([tokens * tokens for tokens in prompts]) * computed,
            output_tokens=_mean(outputs),
            context_tokens=_mean(contexts) or _mean(prompts),
            num_requests=min(len(prompts), len(ends)),
            num_prefill=fleet.num_prefill,
            num_decode=fleet.num_decode,
            queued_tokens=fleet.queued_tokens,
            num_decoding=fleet.num_decoding,
            num_seats=fleet.num_seats,
            kv_tokens=fleet.kv_tokens,
            ttft_s=_ninth_tenth([one.ttft_s for one in ends]),
            tpot_s=_ninth_tenth([one.tpot_s for one in ends]),
        )


def _recent(window: deque[Event], begin: float, now: float) -> tuple[float, list[Event]]:
    """The latest events, and since when there are no others."""
    recent: list[Event] = []
    for one in reversed(window):
        if len(recent) >= ENOUGH and one.at < now - RECENT_S:
            break
        recent.append(one)
    if len(recent) < ENOUGH:
        return begin, recent
    if len(recent) == MAX_REQUESTS:
        return recent[-1].at, recent
    return max(begin, min(recent[-1].at, now - RECENT_S)), recent


def _forget(window: deque[_Arrival] | deque[_End], begin: float) -> None:
    while window and window[0].at < begin:
        window.popleft()


def _ninth_tenth(values: list[float]) -> float:
    """What nine in ten do not exceed; 0.0 for none."""
    return sorted(values)[ceil(0.9 * len(values)) - 1] if values else 0.0


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
