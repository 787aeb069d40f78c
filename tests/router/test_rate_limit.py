"""The account of one API key, on a clock that the tests move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.rate_limit import Bucket, KeyLimiter, RateLimits, duration


def test_requests_per_minute_come_back_steadily() -> None:
    key = KeyLimiter(RateLimits(requests_per_minute=6))
    assert [key.enter(0.0) for _ in range(6)] == [None] * 6
    denial = key.enter(0.0)
    assert denial is not None
    assert denial.what == "6 requests per minute"
    assert denial.retry_after_s == pytest.approx(10)
    assert key.enter(9.9) is not None
    assert key.enter(10.0) is None
    assert key.enter(10.0) is not None
    assert key.num_running == 7


def test_who_waits_as_long_as_told_gets_in() -> None:
    key = KeyLimiter(RateLimits(requests_per_minute=7, tokens_per_minute=1000))
    now = 0.0
    for number in range(50):
        denial = key.enter(now)
        if denial is not None:
            now += denial.retry_after_s + 1e-9
            assert key.enter(now) is None
        key.charge(37 * number, now)


def test_tokens_are_paid_afterwards_and_a_debt_is_worked_off() -> None:
    key = KeyLimiter(RateLimits(tokens_per_minute=60))
    assert key.enter(0.0) is None
    key.charge(90, 0.0)
    denial = key.enter(0.0)
    assert denial is not None
    assert denial.retry_after_s == pytest.approx(31)  # 30 of debt, and one to begin with
    assert key.headers(0.0)["x-ratelimit-remaining-tokens"] == "0"
    assert key.enter(30.9) is not None
    assert key.enter(31.0) is None


def test_concurrency_is_given_back() -> None:
    key = KeyLimiter(RateLimits(max_concurrency=2))
    assert key.enter(0.0) is None
    assert key.enter(0.0) is None
    denial = key.enter(0.0)
    assert denial is not None
    assert "2 requests at the same time" in denial.what
    key.leave()
    assert key.enter(0.0) is None


def test_a_denial_takes_nothing() -> None:
    key = KeyLimiter(RateLimits(requests_per_minute=10, tokens_per_minute=10, max_concurrency=1))
    assert key.enter(0.0) is None
    for _ in range(100):
        assert key.enter(0.0) is not None
    assert key.headers(0.0)["x-ratelimit-remaining-requests"] == "9"
    assert key.num_running == 1


def test_headers_are_openais() -> None:
    assert KeyLimiter(RateLimits(max_concurrency=1)).headers(0.0) == {}
    key = KeyLimiter(RateLimits(requests_per_minute=60, tokens_per_minute=600))
    key.enter(0.0)
    key.charge(100, 0.0)
    assert key.headers(0.0) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "500",
        "x-ratelimit-reset-tokens": "10s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (1, "1s"), (7.5, "7.5s"), (59.9999, "60s"), (360, "6m0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(
    per_minute=st.integers(1, 10_000),
    steps=st.lists(st.tuples(st.floats(-5, 100), st.integers(0, 5000)), max_size=60),
)
def test_nobody_gets_more_than_a_minutes_worth_ahead(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    """Also when the clock stands still or goes back."""
    bucket = Bucket(per_minute)
    begin = latest = now = 0.0
    taken = 0
    for passed, wanted in steps:
        now += passed
        latest = max(latest, now)
        amount = min(wanted, bucket.available(now))
        bucket.take(amount, now)
        taken += amount
        assert 0 <= bucket.available(now) <= per_minute
        assert taken <= per_minute + (latest - begin) * per_minute / 60 + 1e-3
        assert bucket.wait_s(now) >= 0 <= bucket.reset_s(now)
