"""Arrival processes keep their mean rate and are as uneven as they say."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import pvariance

import pytest

from tuner.arrivals import Arrival, ArrivalShape, arrival_offsets

RATE = 5.0


def offsets(arrival: Arrival, number: int, shape: ArrivalShape, seed: int = 1) -> list[float]:
    return list(islice(arrival_offsets(RATE, arrival, seed, shape), number))


@pytest.mark.parametrize("arrival", list(Arrival))
def test_mean_rate_order_and_seed(arrival: Arrival) -> None:
    shape = ArrivalShape(period_s=10.0)
    found = offsets(arrival, 10_000, shape)
    assert found == sorted(found)
    assert 10_000 / found[-1] == pytest.approx(RATE, rel=0.05)
    assert found == offsets(arrival, 10_000, shape)
    assert arrival is Arrival.FIXED or found != offsets(arrival, 10_000, shape, seed=2)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gamma_gaps_vary_as_told(burstiness: float) -> None:
    found = offsets(Arrival.GAMMA, 20_000, ArrivalShape(burstiness=burstiness))
    gaps = [after - before for before, after in pairwise(found)]
    assert pvariance(gaps) * RATE**2 == pytest.approx(1 / burstiness, rel=0.15)


def test_onoff_is_silent_while_off() -> None:
    found = offsets(Arrival.ONOFF, 5000, ArrivalShape(period_s=8.0, on_share=0.25))
    assert all(offset % 8.0 <= 2.0 for offset in found)


def test_diurnal_follows_the_sine() -> None:
    found = offsets(Arrival.DIURNAL, 20_000, ArrivalShape(period_s=20.0, swing=0.8))
    high = sum(offset % 20.0 < 10.0 for offset in found) / len(found)
    assert high == pytest.approx(0.5 + 0.8 / 3.14159, abs=0.02)


@pytest.mark.parametrize(
    "wrong", [{"burstiness": 0}, {"period_s": 0}, {"on_share": 0}, {"on_share": 2}, {"swing": 2}]
)
def test_shape_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        ArrivalShape(**wrong)
