"""Goodput: both limits for the same request, and the rate at which enough keep them."""

from __future__ import annotations

import pytest

from tuner.goodput import Attainment, Slo, attainment, highest_rate
from tuner.record import RequestRecord

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def record(ttft: float, tpot: float, error: str | None = None, tokens: int = 11) -> RequestRecord:
    times = (ttft, ttft + tpot * (tokens - 1))
    return RequestRecord(0, 0.0, 0.0, times[1], times, 5, tokens, error)


def test_kinds_of_requests_have_limits_of_their_own() -> None:
    records = [record(0.5, 0.01), record(5.0, 0.01)]
    tight = Slo(1.0, 1.0)
    assert attainment(records, tight).good == 0.5
    assert attainment(records, lambda one: Slo(2 * (one.ttft or 0), 1.0)).good == 1.0


def test_both_limits_must_hold_together() -> None:
    records = [record(0.5, 0.05), record(1.5, 0.05), record(0.5, 0.2), record(0.5, 0.05, "timeout")]
    assert attainment(records, SLO) == Attainment(good=0.25, ttft=0.5, tpot=0.5, completed=0.75)


def test_two_marginal_shares_may_hide_that_none_is_good() -> None:
    records = [record(0.5, 0.2), record(1.5, 0.05)] * 10
    assert attainment(records, SLO).good == 0
    assert attainment(records, SLO).ttft == attainment(records, SLO).tpot == 0.5


def test_one_token_has_no_tpot_to_miss() -> None:
    single = RequestRecord(0, 0.0, 0.0, 9.0, (0.5,), 5, 1)
    assert attainment([single], SLO).good == 1


def test_an_answer_without_a_visible_token_is_judged_by_its_end() -> None:
    early, late = (RequestRecord(0, 0.0, 0.0, end, (), 5, 1) for end in (0.9, 1.1))
    assert attainment([early], SLO).good == 1
    assert attainment([late], SLO).good == 0


def test_nothing_is_not_good() -> None:
    assert attainment([], SLO) == Attainment(0, 0, 0, 0)


@pytest.mark.parametrize("limit", [0.05, 0.9, 1.0, 1.1, 37.0])
def test_the_highest_rate_is_found(limit: float) -> None:
    tried: list[float] = []

    def holds(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = highest_rate(holds, 1.0)
    assert limit / 1.05 <= found <= limit
    assert len(tried) < 16


def test_no_rate_is_zero() -> None:
    assert highest_rate(lambda _: False, 1.0) == 0


def test_a_load_that_cannot_be_raised_enough_ends() -> None:
    assert highest_rate(lambda _: True, 1.0) >= 256


@pytest.mark.parametrize("limits", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_limits_that_are_none(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Slo(*limits)
