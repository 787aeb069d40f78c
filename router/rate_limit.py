"""How much one API key may ask for: requests and tokens per minute, and requests at the same time.

Pure: time is an argument. What a request will use is not known when it comes, so tokens are paid
afterwards: a request is let in while any are left, its prompt is charged when it is counted, its
output when it ends, and a debt is worked off before the next one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

_MINUTE_S = 60.0
_BUSY_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class RateLimits:
    """For each key; 0 is no limit."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    max_concurrency: int = 0

    @property
    def any(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.max_concurrency)


@dataclass(slots=True)
class Bucket:
    """A token bucket that holds a minute's worth and fills steadily; it may be in debt."""

    per_minute: int
    level: float = field(init=False)
    at: float = 0.0

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def available(self, now: float) -> int:
        self._fill(now)
        return max(0, math.floor(self.level + 1e-9))

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self.level -= amount

    def wait_s(self, now: float) -> float:
        """How long until one is available."""
        self._fill(now)
        return max(0.0, (1 - self.level) * _MINUTE_S / self.per_minute)

    def reset_s(self, now: float) -> float:
        """How long until it is full."""
        self._fill(now)
        return (self.per_minute - self.level) * _MINUTE_S / self.per_minute

    def _fill(self, now: float) -> None:
        grown = max(0.0, now - self.at) * self.per_minute / _MINUTE_S
        self.level = min(self.per_minute, self.level + grown)
        self.at = max(self.at, now)


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a request must wait, and for how long."""

    what: str
    retry_after_s: float


class KeyLimiter:
    """The account of one key."""

    def __init__(self, limits: RateLimits) -> None:
        self._limits = limits
        self._requests = _bucket(limits.requests_per_minute)
        self._tokens = _bucket(limits.tokens_per_minute)
        both = (("requests", self._requests), ("tokens", self._tokens))
        self._buckets = [(what, bucket) for what, bucket in both if bucket is not None]
        self.num_running = 0

    def enter(self, now: float) -> Denial | None:
        """Let a request in, which must `leave`; or say why not, and nothing was taken."""
        limits = self._limits
        if limits.max_concurrency and self.num_running >= limits.max_concurrency:
            return Denial(f"{limits.max_concurrency} requests at the same time", _BUSY_RETRY_S)
        denials = [
            Denial(f"{bucket.per_minute} {what} per minute", bucket.wait_s(now))
            for what, bucket in self._buckets
            if not bucket.available(now)
        ]
        if denials:
            return max(denials, key=lambda denial: denial.retry_after_s)
        if self._requests is not None:
            self._requests.take(1, now)
        self.num_running += 1
        return None

    def charge(self, num_tokens: int, now: float) -> None:
        if self._tokens is not None:
            self._tokens.take(num_tokens, now)

    def leave(self) -> None:
        self.num_running -= 1

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-…`."""
        found = {}
        for name, bucket in self._buckets:
            found[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            found[f"x-ratelimit-remaining-{name}"] = str(bucket.available(now))
            found[f"x-ratelimit-reset-{name}"] = duration(bucket.reset_s(now))
        return found


def _bucket(per_minute: int) -> Bucket | None:
    return Bucket(per_minute) if per_minute else None


def duration(seconds: float) -> str:
    """As OpenAI writes it: `120ms`, `7.5s`, `6m0s`."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000 - 1e-6)}ms"
    if seconds < _MINUTE_S:
        return f"{seconds:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
