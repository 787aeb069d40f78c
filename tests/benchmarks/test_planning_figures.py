"""The arithmetic of errors between real and simulated runs."""

from __future__ import annotations

import pytest

from benchmarks.planning.figures import compare, figures_of, table, worst
from benchmarks.planning.tuning import Shares, ratios, shares
from tuner.goodput import Slo
from tuner.record import RequestRecord


def record(start: float, first: float, last: float, tokens: int) -> RequestRecord:
    times = (start + first, start + last)
    return RequestRecord(0, start, start, start + last, times, 10, tokens)


def test_figures_of_a_run() -> None:
    records = [record(0.0, 0.1, 0.5, 5), record(1.0, 0.3, 1.0, 8)]
    found = figures_of(records, Slo(ttft_s=0.2, tpot_s=1.0))
    assert found["ttft_p50"] == pytest.approx(200)
    assert found["ttft_p90"] == pytest.approx(280)
    assert found["tpot_p50"] == pytest.approx(100)
    assert found["throughput"] == pytest.approx(13 / 2.0)
    assert found["goodput"] == pytest.approx(1 / 2.0)  # the second is late


def test_errors_are_relative_to_the_mean_of_the_runs() -> None:
    real = [{"ttft_p50": 90.0, "goodput": 2.0}, {"ttft_p50": 110.0, "goodput": 2.0}]
    simulated = [{"ttft_p50": 80.0, "goodput": 2.5}, {"ttft_p50": 90.0, "goodput": 2.5}]
    rows = compare("chats", real, simulated)
    ttft, goodput = rows
    assert (ttft.real, ttft.spread, ttft.error) == pytest.approx((100.0, 0.2, 0.15))
    assert ttft.drift == pytest.approx(10 / 85)  # from pace to pace
    assert ttft.within  # beyond 10 %, within the spread of the runs
    assert goodput.error == pytest.approx(0.25)
    assert not goodput.within
    told = table(rows)
    assert "| chats | ttft p50, ms | 100 | 20.0% | 85 | 11.8% | 15.0% (by the spread) |" in told
    assert "| goodput, requests/s | 2 | 0.0% | 2.5 | 0.0% | 25.0% (beyond the goal) |" in told


def test_the_worst_workload_counts() -> None:
    rows = [
        *compare("a", [{"tpot_p90": 10.0}], [{"tpot_p90": 11.0}]),
        *compare("b", [{"tpot_p90": 10.0}], [{"tpot_p90": 7.0}]),
    ]
    assert worst(rows, "tpot_p90") == pytest.approx(0.3)
    assert [row.within for row in rows] == [True, False]


def test_nothing_against_something_is_no_small_error() -> None:
    (nothing,) = compare("a", [{"goodput": 0.0}], [{"goodput": 0.0}])
    (something,) = compare("a", [{"goodput": 0.0}], [{"goodput": 0.1}])
    assert nothing.error == 0.0
    assert something.error == float("inf")


def test_the_tail_has_no_goal() -> None:
    (row,) = compare("a", [{"ttft_p99": 10.0}], [{"ttft_p99": 100.0}])
    assert row.within


def test_the_tuner_is_held_against_the_best_split_of_each_phase() -> None:
    static = [Shares((0.9, 0.3), 0.6), Shares((0.4, 0.8), 0.65)]
    worst, overall = ratios(Shares((0.85, 0.78), 0.81), static)
    assert worst == pytest.approx(0.85 / 0.9)
    assert overall == pytest.approx(0.81 / 0.65)


def test_requests_belong_to_the_phase_in_which_they_were_due() -> None:
    records = [record(1.0, 0.1, 0.5, 5), record(9.0, 9.0, 9.5, 5), record(11.0, 0.1, 0.5, 5)]
    found = shares(records, Slo(1.0, 1.0), phase_s=10.0)
    assert found.phases == (0.5, 1.0)
    assert found.overall == pytest.approx(2 / 3)
