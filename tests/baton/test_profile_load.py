"""A fleet's pace under load: found again where it is known, from requests that come and go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.profile_load import (
    ANSWERS,
    FEWEST,
    PROMPTS,
    at_bound,
    coming_and_going,
    first_tokens,
    fitted_to,
    times_as_long,
    twin,
)
from baton.simulation.simulate import simulate
from tuner.latency import LatencyModel
from tuner.overheads import Overheads
from tuner.profile import Profile
from tuner.record import RequestRecord
from wire.layout import KVLayout

MODEL = LatencyModel((0.02, 1e-3, 3e-7), (0.025, 2e-6, 1e-3), (0.001, 1e-10))
LAYOUT = KVLayout(2, 2, 16, 16, "float32")
PROBED = Overheads(front_s=0.003, handoff_s=0.002, step_s=0.002, prefill_factor=1.1)
SECONDS = 30.0


def profile(max_model_len: int = 2048, over: Overheads = PROBED) -> Profile:
    return Profile("made up", "1", "a machine", max_model_len, LAYOUT, MODEL, {}, over)


@pytest.mark.parametrize(
    ("prefill", "decode"), [(1.1, 1.0), (1.9, 1.6), (1.2, 1.9), (0.8, 0.7), (1.8, 1.0)]
)
@pytest.mark.parametrize("slowdown", [1.0, 1.2])
def test_a_pace_is_found_again(prefill: float, decode: float, slowdown: float) -> None:
    over = replace(PROBED, prefill_slowdown=slowdown, decode_slowdown=slowdown)
    setup = twin(profile(over=over), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=1)
    true = replace(over, prefill_factor=prefill, decode_factor=decode)
    real = simulate(replace(setup, overheads=true), trace).records
    found = fitted_to(setup, trace, real)
    assert found.prefill_factor == pytest.approx(prefill, rel=0.05)
    assert found.decode_factor == pytest.approx(decode, rel=0.05)
    same = replace(found, front_s=over.front_s, prefill_factor=1.1, decode_factor=1.0)
    assert same == over, "the rest is as probed"
    assert found.front_s == pytest.approx(over.front_s, abs=0.005)
    assert not at_bound(found, over)


def test_what_a_request_takes_on_its_way_is_no_pace() -> None:
    """A small model on a fleet whose router takes ten times as long as its prefills."""
    quick = LatencyModel((1e-3, 1e-6, 0.0), (1e-3, 0.0, 1e-5), (0.001, 1e-10))
    over = replace(PROBED, front_s=0.03)
    setup = replace(twin(profile(over=over), chunk=512), model=quick)
    trace = coming_and_going(setup, SECONDS, seed=1)
    true = replace(over, prefill_factor=2.2, decode_factor=1.5)
    found = fitted_to(setup, trace, simulate(replace(setup, overheads=true), trace).records)
    assert found.prefill_factor == pytest.approx(2.2, rel=0.05)
    assert found.decode_factor == pytest.approx(1.5, rel=0.05)
    assert found.front_s == pytest.approx(0.03, rel=0.1)


@pytest.mark.parametrize("front_s", [0.0, 0.004, 0.08])
def test_what_a_request_takes_on_its_way_is_found_anew(front_s: float) -> None:
    """The probes may have met a slow minute, and a constant is no pace."""
    over = replace(PROBED, front_s=0.03)
    setup = twin(profile(over=over), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=1)
    true = replace(over, front_s=front_s, prefill_factor=1.6)
    found = fitted_to(setup, trace, simulate(replace(setup, overheads=true), trace).records)
    assert found.front_s == pytest.approx(front_s, abs=0.006)
    assert found.prefill_factor == pytest.approx(1.6, rel=0.05)


def test_a_few_requests_that_were_held_up_change_little() -> None:
    setup = twin(profile(), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=2)
    true = replace(PROBED, prefill_factor=1.5, decode_factor=1.3)
    real = simulate(replace(setup, overheads=true), trace).records
    held_up = [
        replace(one, chunk_times=tuple(at + 2.0 for at in one.chunk_times))
        if one.index % 5 == 0
        else one
        for one in real
    ]
    found = fitted_to(setup, trace, held_up)
    assert found.prefill_factor == pytest.approx(1.5, rel=0.15)
    assert found.decode_factor == pytest.approx(1.3, rel=0.05)


def test_a_fleet_that_stands_still_has_no_pace() -> None:
    setup = twin(profile(), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=3)
    real = [
        RequestRecord(i, r.at, r.at, r.at + 900.0, (r.at + 400.0, r.at + 900.0), 10, r.output_len)
        for i, r in enumerate(trace.requests)
    ]
    with pytest.raises(ValueError, match="no times per request"):
        fitted_to(setup, trace, real)


def test_a_fleet_far_from_what_the_probes_found_ends_in_a_factor_all_the_same() -> None:
    setup = twin(profile(), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=3)
    true = replace(PROBED, decode_factor=6.0)
    found = fitted_to(setup, trace, simulate(replace(setup, overheads=true), trace).records)
    assert found.decode_factor == 4.0
    assert at_bound(found, PROBED), "and that is told"


def test_requests_come_and_go() -> None:
    setup = twin(profile(), chunk=512)
    trace = coming_and_going(setup, SECONDS, seed=4)
    busy = simulate(setup, trace).busy
    assert 0.3 < max(busy.values()) < 0.5, "idle more than half of the time"
    assert all(PROMPTS.lo <= r.input_len <= PROMPTS.hi for r in trace.requests)
    assert all(ANSWERS.lo <= r.output_len <= ANSWERS.hi for r in trace.requests)
    assert trace.requests[-1].at <= SECONDS
    assert trace != coming_and_going(setup, SECONDS, seed=5)
    assert len(coming_and_going(setup, 0.1, seed=4).requests) == FEWEST


def test_prompts_fit_a_model_of_few_tokens() -> None:
    trace = coming_and_going(twin(profile(max_model_len=64), chunk=512), SECONDS, seed=1)
    assert all(r.input_len + r.output_len <= 64 for r in trace.requests)


def test_what_does_not_tell_a_time_does_not_count() -> None:
    def record(index: int, *times: float, tokens: int = 3) -> RequestRecord:
        return RequestRecord(index, 0.0, 0.0, 9.0, times, 10, tokens)

    real = [record(0, 2.0, 4.0), record(1), record(2, 3.0, 5.0), record(3, 9.0)]
    simulated = [record(2, 1.0, 2.0), record(0, 1.0, 3.0), record(1, 1.0)]
    assert times_as_long(real, simulated) == pytest.approx(1.5)
    assert times_as_long([], simulated) == 1.0
    assert first_tokens([], simulated, 0.1) == (0.1, 1.0)
    longer_sooner = [record(0, 1.2), record(2, 1.3)], [record(0, 0.6), record(2, 0.5)]
    way_s, times = first_tokens(*longer_sooner, 0.1)
    assert times == 1.0
    assert way_s == pytest.approx(0.8), "what is computed is not counted twice"
    assert first_tokens([record(1)], simulated, 0.1) == (0.1, 1.0)
