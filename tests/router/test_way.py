"""Handing over or not: each rule alone, and what must hold whatever the numbers are."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from router.pace import Pace
from router.way import Mode, Over, Part, Reason, Rules, choose_way
from tuner.goodput import Slo
from tuner.latency import LatencyModel, StepWork

MODEL = LatencyModel((0.010, 1e-3, 0.0), (0.020, 0.0, 1e-3), (0.0, 1e-9))
PACE = Pace(MODEL, handoff=(0.010, 1e-9), stream_s=2.0, chunk=512)
RULES = Rules()
STREAMS = StepWork(decode_batch=4, decode_context=400)


def over(num_tokens: int, queued: int = 0, num_bytes: int = 0, streams: StepWork = STREAMS) -> Over:
    return Over(Part(num_tokens, 0, queued), streams, 0.0, num_bytes)


def here(num_tokens: int, cached: int = 0, queued: int = 0, lately_s: float = 0.0) -> Part:
    return Part(num_tokens, cached, queued, STREAMS, lately_s)


def test_the_only_way_is_taken_whatever_is_wished() -> None:
    never, always = Rules(Mode.NEVER), Rules(Mode.ALWAYS)
    assert choose_way(over(100), None, PACE, never).hand_over
    found = choose_way(None, here(100), PACE, always)
    assert not found.hand_over
    assert found.reason is Reason.ONLY


def test_the_wish_counts_where_both_are_open() -> None:
    for mode in (Mode.ALWAYS, Mode.NEVER):
        found = choose_way(over(1), here(1), PACE, Rules(mode))
        assert found.hand_over is (mode is Mode.ALWAYS)
        assert found.reason is Reason.FORCED


def test_a_handoff_that_fails_is_not_tried_where_another_way_is_open() -> None:
    """Only `always` and the lack of another way insist on it."""
    bad = replace(over(1500, queued=0), failing=True)
    for pace in (PACE, None):
        found = choose_way(bad, here(1500), pace, RULES)
        assert not found.hand_over
        assert found.reason is Reason.FAILING
    assert choose_way(bad, here(1500), PACE, Rules(Mode.ALWAYS)).hand_over
    assert choose_way(bad, None, PACE, RULES).hand_over


def test_nothing_measured_means_a_handoff_but_for_a_short_rest() -> None:
    """A chat's next turn, whose history is cached where it was answered."""
    assert choose_way(over(400), here(400), None, RULES).reason is Reason.UNKNOWN
    assert choose_way(over(400), here(400, cached=383), None, RULES).hand_over
    rest = choose_way(over(400), here(400, cached=384), None, RULES)
    assert not rest.hand_over
    assert rest.reason is Reason.SHORT


def test_the_next_turn_of_a_chat_stays_where_its_history_is() -> None:
    found = choose_way(over(1000), here(1000, cached=980), PACE, RULES)
    assert not found.hand_over
    assert found.reason is Reason.SOONER


def test_a_long_prompt_is_handed_over_for_the_sake_of_the_streams() -> None:
    found = choose_way(over(1500, queued=3000), here(1500), PACE, RULES)
    assert found.hand_over
    assert found.reason is Reason.STREAMS


def test_a_short_prompt_goes_around_a_queue() -> None:
    assert choose_way(over(300), here(300), PACE, RULES).hand_over
    found = choose_way(over(300, queued=1500), here(300), PACE, RULES)
    assert not found.hand_over
    assert found.reason is Reason.SOONER


def test_a_handoff_that_costs_more_than_the_prompt_is_not_made() -> None:
    slow = replace(PACE, handoff=(0.5, 0.0))
    assert choose_way(over(300), here(300), PACE, RULES).hand_over
    assert not choose_way(over(300), here(300), slow, RULES).hand_over
    assert not choose_way(over(300, num_bytes=1 << 30), here(300), PACE, RULES).hand_over


def test_many_short_prompts_are_as_bad_as_a_long_one() -> None:
    found = choose_way(over(300, queued=3000), here(300, lately_s=0.9), PACE, RULES)
    assert found.hand_over
    assert found.reason is Reason.STREAMS


def test_an_idle_node_takes_a_long_prompt_that_would_wait_elsewhere() -> None:
    idle = Part(1500, 0, 0)
    found = choose_way(over(1500, queued=2000), idle, PACE, RULES)
    assert not found.hand_over
    assert found.reason is Reason.IDLE
    assert choose_way(over(1500, queued=1000), idle, PACE, RULES).hand_over


def test_limits_weigh_a_late_first_token_against_slow_streams() -> None:
    tight_ttft = Rules(slo=Slo(0.5, 1.0))
    tight_tpot = Rules(slo=Slo(10.0, 0.026))
    queued, place = over(300, queued=300), here(300)
    assert choose_way(queued, place, PACE, tight_ttft).hand_over is False
    assert choose_way(queued, place, PACE, tight_tpot).hand_over is True
    assert choose_way(queued, place, PACE, tight_tpot).reason is Reason.SLACK


def test_what_the_prompt_takes_is_told() -> None:
    found = choose_way(over(300), here(300, cached=200), PACE, RULES)
    assert abs(found.taken_s - 0.110) < 1e-9
    assert found.over_s is not None
    assert abs(found.over_s[0] - 0.310) < 1e-9


tokens = st.integers(1, 8000)
batches = st.integers(0, 64)


@st.composite
def asks(draw: st.DrawFn) -> tuple[Over, Part, Rules]:
    num_tokens, batch = draw(tokens), draw(batches)
    streams = StepWork(decode_batch=batch, decode_context=100 * batch)
    lately_s = draw(st.floats(0, 4))
    sender = Part(num_tokens, draw(st.integers(0, num_tokens)), draw(st.integers(0, 20_000)))
    place = Part(
        num_tokens,
        draw(st.integers(0, num_tokens)),
        draw(st.integers(0, 20_000)),
        streams,
        lately_s,
    )
    limits = draw(st.none() | st.builds(Slo, st.floats(0.05, 20), st.floats(0.005, 1)))
    way = Over(sender, streams, lately_s, draw(st.integers(0, 1 << 32)))
    return way, place, Rules(slo=limits, share=draw(st.floats(0.05, 0.95)))


@settings(deadline=None)
@given(asks(), st.integers(1, 20_000))
def test_a_longer_queue_at_the_prefill_node_never_brings_a_handoff(
    ask: tuple[Over, Part, Rules], more: int
) -> None:
    way, place, rules = ask
    longer = replace(way, sender=replace(way.sender, num_queued=way.sender.num_queued + more))
    if not choose_way(way, place, PACE, rules).hand_over:
        assert not choose_way(longer, place, PACE, rules).hand_over


@settings(deadline=None)
@given(asks(), st.floats(0, 1), st.floats(0.001, 4))
def test_busier_streams_never_bring_a_prompt_between_them(
    ask: tuple[Over, Part, Rules], cached: float, more_s: float
) -> None:
    """Nor does less of its prefix in their cache."""
    way, place, rules = ask
    rules = replace(rules, slo=None)
    worse = replace(
        place, num_cached=int(cached * place.num_cached), lately_s=place.lately_s + more_s
    )
    if choose_way(way, place, PACE, rules).hand_over:
        assert choose_way(way, worse, PACE, rules).hand_over


@settings(deadline=None)
@given(asks())
def test_streams_lose_no_more_than_their_share_unless_there_are_none(
    ask: tuple[Over, Part, Rules],
) -> None:
    way, place, rules = ask
    found = choose_way(way, place, PACE, rules)
    if not found.hand_over and not place.is_idle:
        assert place.lately_s + found.taken_s <= rules.share * PACE.stream_s
