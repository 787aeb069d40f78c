"""What a router learns of its fleet's pace from requests on their way."""

from __future__ import annotations

import pytest

from router.pace import LivePace, Pace
from tuner.latency import LatencyModel, StepWork

MODEL = LatencyModel((0.010, 1e-3, 1e-7), (0.020, 1e-5, 1e-3), (0.0, 1e-9))


def test_a_prompt_is_computed_in_chunks_of_which_each_has_its_constant() -> None:
    pace = Pace(MODEL, (0.0, 0.0), chunk=100)
    assert pace.prompt_s(0, 250) == pytest.approx(0.030 + 0.250 + 1e-7 * 250**2)
    assert pace.prompt_s(200, 250) == pytest.approx(0.010 + 0.050 + 1e-7 * (250**2 - 200**2))


def test_streams_make_each_of_its_steps_longer() -> None:
    pace = Pace(MODEL, (0.0, 0.0), chunk=100)
    streams = StepWork(decode_batch=3, decode_context=1000)
    beside = 0.020 - 0.010 + 0.010 + 0.003  # the larger constant, the context, the batch
    assert pace.between_s(0, 250, streams) == pytest.approx(pace.prompt_s(0, 250) + 3 * beside)
    assert pace.between_s(0, 250, StepWork()) == pytest.approx(pace.prompt_s(0, 250))


def learned(live: LivePace) -> Pace:
    assert live.pace is not None
    return live.pace


def test_nothing_is_said_before_all_three_were_seen() -> None:
    live = LivePace()
    live.prefilled(0, 100, 0.1)
    live.handed_over(1000, 0.02)
    assert live.pace is None
    live.streamed(20, 0.6)
    assert learned(live).token_s(StepWork()) == pytest.approx(0.03)
    assert learned(live).handoff_s(1000) == pytest.approx(0.02)


def test_the_first_prompt_tells_of_longer_ones() -> None:
    """A single length could as well be a constant; long prompts would look like short ones."""
    live = LivePace()
    live.prefilled(0, 100, 0.1)
    live.handed_over(0, 0.02)
    live.streamed(20, 0.6)
    assert learned(live).prompt_s(0, 500) > 0.4


def test_it_finds_the_formulas_that_made_the_samples() -> None:
    live, true = LivePace(), Pace(MODEL, (0.010, 1e-8), chunk=10_000)
    live.streamed(20, 0.6)
    for number in range(600):
        cached, length = 16 * (number % 3), 50 + 37 * (number % 41)
        live.prefilled(cached, length, true.prompt_s(cached, length))
        live.handed_over(length * 1000, true.handoff_s(length * 1000))
    assert learned(live).prompt_s(0, 700) == pytest.approx(true.prompt_s(0, 700), rel=0.05)
    assert learned(live).handoff_s(700_000) == pytest.approx(true.handoff_s(700_000), rel=0.05)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    live = LivePace()
    live.handed_over(0, 0.02)
    for factor in (1.0, 3.0):
        for number in range(400):
            length = 50 + 37 * (number % 41)
            live.prefilled(0, length, factor * length * 1e-3)
            live.streamed(20, factor * 0.6)
    assert learned(live).prompt_s(0, 500) == pytest.approx(1.5, rel=0.2)
    assert learned(live).token_s(StepWork()) == pytest.approx(0.09, rel=0.05)
    assert learned(live).stream_s == pytest.approx(1.8, rel=0.05)


def test_a_link_that_becomes_a_hundred_times_slower_is_noticed_within_a_few_handoffs() -> None:
    """And that it recovers, with the first one."""
    live = LivePace()
    live.prefilled(0, 100, 0.1)
    live.streamed(20, 0.6)
    for number in range(300):
        live.handed_over(1000 * (number % 7), 0.005)
    for number in range(4):
        live.handed_over(1000 * number, 0.5)
    assert learned(live).handoff_s(1000) < 0.1, "some have bad luck"
    live.handed_over(4000, 0.5)
    assert learned(live).handoff_s(1000) == pytest.approx(0.5, rel=0.1)
    live.handed_over(1000, 0.005)
    assert learned(live).handoff_s(1000) < 0.1


def test_bad_luck_now_and_then_is_no_change() -> None:
    live = LivePace()
    live.prefilled(0, 100, 0.1)
    live.streamed(20, 0.6)
    for number in range(300):
        live.handed_over(1000, 0.5 if number % 5 else 0.005)
    assert learned(live).handoff_s(1000) < 0.1


def test_samples_that_say_nothing_are_not_taken() -> None:
    live = LivePace()
    live.prefilled(100, 100, 0.1)
    live.prefilled(0, 100, 0.0)
    live.streamed(0, 1.0)
    live.handed_over(0, 0.02)
    assert live.pace is None
