"""Phases touch and add up, whatever happens in whatever order."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from telemetry.timeline import MEANING, Phase, Timeline

EVENTS: dict[str, Callable[[Timeline, float], object]] = {
    "body_read": lambda t, now: t.body_read(now),
    "tokenized": lambda t, now: t.tokenized(now),
    "reserving": lambda t, now: t.reserving(now),
    "prefilling": lambda t, now: t.prefilling(now),
    "waiting": lambda t, now: t.waiting(now),
    "attempt_over": lambda t, now: t.attempt_over(now),
    "decoding": lambda t, now: t.decoding(now),
    "first": lambda t, now: t.tokens(now, from_decode=False, prefill_s=(0.25, 0.5)),
    "tokens": lambda t, now: t.tokens(now, from_decode=True),
    "end": lambda t, now: t.end(now),
}


def play(*events: tuple[str, float]) -> Timeline:
    timeline = Timeline(arrived=100.0)
    for name, at in events:
        EVENTS[name](timeline, 100.0 + at)
    return timeline


def phases(timeline: Timeline) -> list[tuple[str, float]]:
    """(phase, seconds it took)"""
    return [(span.phase.value, (span.end - span.start) / 1e6) for span in timeline.spans()]


STARTED = (("body_read", 0.25), ("tokenized", 0.5), ("reserving", 1.0))


def test_a_request_that_nothing_happens_to() -> None:
    timeline = play(
        *STARTED,
        ("prefilling", 1.5),
        ("first", 3.0),
        ("decoding", 3.5),
        ("tokens", 4.0),
        ("tokens", 5.0),
        ("end", 5.0),
    )
    assert phases(timeline) == [
        ("read", 0.25),
        ("tokenize", 0.25),
        ("queue", 0.5),
        ("reserve", 0.5),
        ("prefill-queue", 0.25),
        ("prefill", 0.5),
        ("network", 0.75),
        ("handoff", 0.5),
        ("decode", 1.5),
    ]
    assert [span.phase for span in timeline.spans_to_first_token()][-1] is Phase.NETWORK
    assert timeline.queue_s == 1.0
    assert timeline.time_to_first_token_s == 3.0
    assert timeline.prefill_s == 2.0
    assert timeline.decode_s == 2.0
    assert timeline.inference_s == 4.0
    assert timeline.total_s == 5.0


def test_an_attempt_that_dies_before_the_first_token_is_one_phase() -> None:
    timeline = play(
        *STARTED,
        ("prefilling", 1.5),
        ("attempt_over", 4.0),
        ("reserving", 4.0),
        ("prefilling", 4.25),
        ("first", 5.0),
    )
    assert phases(timeline)[2:] == [
        ("queue", 0.5),
        ("retry", 3.0),
        ("reserve", 0.25),
        ("prefill-queue", 0.25),
        ("prefill", 0.5),
    ]
    assert timeline.queue_s == 1.0  # to the first dispatch, whatever became of it


def test_being_refused_is_part_of_the_queue() -> None:
    timeline = play(
        *STARTED,
        ("waiting", 1.25),
        ("reserving", 2.0),
        ("waiting", 2.25),
        ("reserving", 3.0),
        ("reserving", 3.25),  # another node was asked
        ("prefilling", 3.5),
        ("first", 3.5),
    )
    assert phases(timeline)[2:] == [("queue", 2.5), ("reserve", 0.5)]


def test_after_the_first_token_a_retry_lasts_until_there_are_tokens_again() -> None:
    timeline = play(
        *STARTED,
        ("prefilling", 1.0),
        ("first", 2.0),
        ("decoding", 2.5),
        ("tokens", 3.0),
        ("attempt_over", 4.0),
        ("reserving", 4.5),
        ("prefilling", 5.0),
        ("attempt_over", 6.0),
        ("reserving", 6.0),
        ("prefilling", 6.5),
        ("first", 7.0),
        ("tokens", 7.25),
        ("end", 8.0),
    )
    assert phases(timeline)[-5:] == [
        ("handoff", 0.5),
        ("decode", 1.5),
        ("retry", 3.0),
        ("handoff", 0.25),
        ("decode", 0.75),
    ]
    assert timeline.time_to_first_token_s == 2.0


def test_a_node_that_says_nothing_or_too_much() -> None:
    silent = play(*STARTED, ("prefilling", 1.0), ("tokens", 2.0))
    assert phases(silent)[-1] == ("prefill", 1.0)
    hasty = play(*STARTED, ("prefilling", 1.0), ("first", 1.5))
    assert phases(hasty)[-2:] == [("prefill-queue", 0.25), ("prefill", 0.25)]


def test_what_is_running_shows_its_open_phase() -> None:
    timeline = play(*STARTED)
    assert [span.phase for span in timeline.spans()] == [Phase.READ, Phase.TOKENIZE, Phase.QUEUE]
    *_, open_span = timeline.spans(now=103.0)
    assert (open_span.phase, open_span.end) == (Phase.RESERVE, 3_000_000)


def test_every_phase_is_explained() -> None:
    assert set(MEANING) == set(Phase)


STEPS = st.tuples(st.sampled_from(sorted(EVENTS)), st.floats(-0.5, 3, allow_nan=False))


@given(st.lists(STEPS, max_size=40))
def test_phases_touch_and_add_up_in_any_order_of_events(steps: list[tuple[str, float]]) -> None:
    timeline, now = Timeline(arrived=100.0), 100.0
    for name, passed in steps:
        now += passed  # at times the clock goes backwards
        EVENTS[name](timeline, now)
        spans = timeline.spans(now)
        assert all(span.start <= span.end for span in spans)
        assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
        if timeline.first_token is not None:
            before = timeline.spans_to_first_token()
            assert sum(span.end - span.start for span in before) == timeline.first_token
    timeline.end(now)
    assert sum(span.end - span.start for span in timeline.spans()) == timeline.ended
    assert timeline.last_token is None or timeline.last_token <= (timeline.ended or 0)
