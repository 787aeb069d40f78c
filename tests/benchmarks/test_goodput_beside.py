"""Goodput of fleets beside each other, on made-up fleets whose capacity is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from baton.simulation.planner import Candidate
from baton.simulation.setup import Split
from benchmarks.planning.beside import (
    MAX_RATES,
    Measured,
    alone,
    at_rate,
    kind_of,
    limits_from,
    load,
    measured_goodput,
    ratio,
)
from tuner.goodput import Attainment, Slo
from tuner.record import RequestRecord
from tuner.trace import Trace

LIMITS = {"chat": Slo(0.4, 0.07), "long": Slo(8.0, 0.12)}


def share(good: float) -> Attainment:
    return Attainment(good, good, 1.0, 1.0)


def searched(measured: Measured, capacity: float) -> Measured:
    """A fleet whose requests are all good up to `capacity`, and half of them beyond."""
    while (rate := measured.next_rate) is not None:
        measured.take(rate, share(1.0 if rate <= capacity else 0.5))
    return measured


@pytest.mark.parametrize("first", [0.6, 1.0, 1.9])
def test_the_search_closes_in_from_either_side(first: float) -> None:
    found = searched(Measured(first), 1.2)
    assert found.goodput == pytest.approx(1.2, rel=0.3)
    assert len(found.seen) <= MAX_RATES


def test_the_crossing_is_on_a_straight_line() -> None:
    found = Measured(1.0)
    for rate, good in ((1.0, 1.0), (2.0, 0.8), (2.0, 0.7)):
        found.take(rate, share(good))
    assert found.next_rate is None
    assert found.goodput == pytest.approx(1.5)


def test_a_slow_minute_is_no_verdict() -> None:
    found = Measured(1.0)
    found.take(1.0, share(0.3))
    assert found.next_rate == 1.0, "once more"
    found.take(1.0, share(0.95))
    assert found.next_rate == pytest.approx(1.3)
    found.take(1.3, share(0.5))
    found.take(1.3, share(0.4))
    assert found.seen[1.3].good == 0.5
    assert found.next_rate is None


def test_a_fleet_that_is_never_good_ends_with_nothing() -> None:
    found = searched(Measured(1.0), 0.0)
    assert found.goodput == 0
    assert len(found.seen) == MAX_RATES
    assert ratio(1.0, found.goodput) is None


def test_a_fleet_that_is_always_good_is_as_good_as_was_tried() -> None:
    found = searched(Measured(1.0), 1e9)
    assert found.goodput == max(found.seen)


def record(prompt: int, ttft: float, tpot: float, index: int = 0) -> RequestRecord:
    return RequestRecord(index, 0.0, 0.0, ttft + tpot, (ttft, ttft + 4 * tpot), prompt, 5)


def test_limits_are_multiples_of_each_kinds_median() -> None:
    records = [record(50, 0.1 * n, 0.03) for n in (1, 2, 9)] + [record(1700, 2.0, 0.05)]
    limits = limits_from(records)
    assert limits["chat"].ttft_s == pytest.approx(0.8)
    assert limits["chat"].tpot_s == pytest.approx(0.075)
    assert limits["long"].ttft_s == pytest.approx(8.0)


def test_the_load_has_both_kinds_at_every_rate() -> None:
    for rate in (0.5, 3.0):
        trace = at_rate(rate, 25.0)
        long = sum(request.input_len >= 1000 for request in trace.requests)
        assert long / len(trace.requests) == pytest.approx(0.15, abs=0.02)
        assert trace.rate == pytest.approx(rate)
    assert sum(request.input_len < 100 for request in load(40).requests) == 34
    apart = [request.at for request in alone(3, 2, 2.0, 4.0).requests]
    assert apart == [0.0, 2.0, 4.0, 6.0, 10.0]


def test_fleets_are_measured_in_turns_and_told() -> None:
    capacity = {"colocated": 1.0, "planned": 2.5}
    asked: list[str] = []

    @contextmanager
    def fleets(candidate: Candidate) -> Iterator[str]:
        yield "planned" if candidate.split.prefill else "colocated"

    def ask(url: str, trace: Trace, seed: int) -> list[RequestRecord]:
        asked.append(url)
        ttft = 0.1 if trace.rate <= capacity[url] else 0.9
        return [record(r.input_len, ttft, 0.03) for r in trace.requests]

    candidates = {
        "colocated": Candidate(Split(mixed=2), 512, 0.9, ()),
        "planned": Candidate(Split(1, 1), 512, 2.0, ()),
    }
    told: list[str] = []
    found = measured_goodput(candidates, LIMITS, fleets, 25.0, told.append, ask)
    assert asked[2:6] == ["colocated", "planned"] * 2, "each was warm, then one after the other"
    assert found["planned"].goodput > 2 * found["colocated"].goodput
    assert any("planned at 2.00/s" in line for line in told)
    assert kind_of(record(1000, 0, 0)) == "long"
