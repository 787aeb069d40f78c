"""The online tuner's decision: where pressure is, when it moves a node, and when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.observed import Observed, Standing
from tuner.online import (
    IMPOSSIBLE,
    LEAST_SHARE,
    RECOVER_S,
    Costs,
    Limits,
    Observation,
    Pressure,
    State,
    decide,
    pressure,
)
from tuner.overheads import Overheads

MODEL = LatencyModel(prefill=(0.005, 1e-3, 1e-7), decode=(0.02, 2e-6, 5e-4), transfer=(0.001, 1e-9))
COSTS = Costs(MODEL)
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
LIMITS = Limits(hold_s=10, pause_s=30)
LOAD = Observation(
    requests_per_s=10,
    answers_per_s=10,
    prompt_tokens=400,
    prompt_squares=400 * 400,
    output_tokens=100,
    context_tokens=450,
    num_requests=300,
    num_prefill=3,
    num_decode=3,
)


def test_pressure_by_hand() -> None:
    service = 0.005 + 0.4 + 0.016
    waits = (1.0 - service) / (1.5 * service)
    batch = (0.05 - 0.02) / (450 * 2e-6 + 5e-4)
    found = pressure(LOAD, COSTS, SLO)
    assert found.prefill == pytest.approx(10 * service * (1 + waits) / waits / 3)
    assert found.decode == pytest.approx(10 * 100 / (batch / 0.05) / 3)


def test_more_nodes_of_a_role_press_less() -> None:
    more = pressure(replace(LOAD, num_prefill=6), COSTS, SLO)
    assert more.prefill == pytest.approx(pressure(LOAD, COSTS, SLO).prefill / 2)
    assert more.decode == pressure(LOAD, COSTS, SLO).decode


@pytest.mark.parametrize("slo", [Slo(0.3, 0.05), Slo(1.0, 0.02)])
def test_a_limit_below_an_empty_fleets_time_cannot_be_kept(slo: Slo) -> None:
    assert pressure(LOAD, COSTS, slo).worst >= IMPOSSIBLE / 3


def test_what_no_step_takes_comes_off_the_limits() -> None:
    """A limit that is 0.3 s tighter, or a tenth of a second that 100 tokens share."""
    slow_front, slow_handoff = replace(COSTS, front_s=0.3), replace(COSTS, handoff_s=0.99)
    tighter = pressure(LOAD, COSTS, Slo(0.7, 0.04))
    plain = pressure(LOAD, COSTS, SLO)
    assert pressure(LOAD, slow_front, SLO) == Pressure(tighter.prefill, plain.decode)
    assert pressure(LOAD, slow_handoff, SLO).prefill == plain.prefill
    assert pressure(LOAD, slow_handoff, SLO).decode == pytest.approx(tighter.decode)
    assert tighter.prefill > 1.1 * plain.prefill
    assert tighter.decode > 1.1 * plain.decode


def test_a_fleets_own_overheads_are_what_counts() -> None:
    overheads = Overheads(front_s=0.3, handoff_s=0.1, step_s=0.002)
    assert Costs.of(MODEL, overheads) == Costs(MODEL, 0.3, 0.1)


def test_a_handoff_of_a_single_token_is_shared_by_nobody() -> None:
    for tokens in (0.0, 1.0, 1.5, 2.0):
        assert replace(COSTS, handoff_s=0.02).left_of(SLO, tokens).tpot_s == pytest.approx(0.03)


def test_overheads_that_cannot_be_leave_half_of_a_limit() -> None:
    """A probe that something disturbed is no reason to do nothing."""
    spoilt = replace(COSTS, front_s=30.0, handoff_s=30.0)
    half = Slo(LEAST_SHARE * SLO.ttft_s, LEAST_SHARE * SLO.tpot_s)
    assert spoilt.left_of(SLO, 100) == half
    assert moved(run([PROMPTS] * 20, costs=spoilt))


def at_rate(load: Observation, rate: float) -> Observation:
    return replace(load, requests_per_s=rate, answers_per_s=rate)


def run(loads: list[Observation], every_s: float = 1.0, costs: Costs = COSTS) -> list[int]:
    """How many nodes go to prefill at each look; they are there at all later ones."""
    state, moves, prefill = State(), [], 0
    for index, load in enumerate(loads):
        seen = replace(
            load, num_prefill=load.num_prefill + prefill, num_decode=load.num_decode - prefill
        )
        decision, state = decide(seen, state, index * every_s, costs, SLO, LIMITS)
        moves.append({"prefill": 1, "decode": -1, "": 0}[decision.grow] * decision.count)
        prefill += moves[-1]
    return moves


def moved(moves: list[int]) -> list[tuple[int, int]]:
    return [(index, move) for index, move in enumerate(moves) if move]


PROMPTS = replace(LOAD, output_tokens=10)  # all the work is in prompts
OUTPUTS = replace(LOAD, prompt_tokens=40, prompt_squares=1600, output_tokens=400)
WANTING_PREFILL = State("prefill", -100)


def test_a_step_moves_as_many_nodes_as_it_takes_at_once() -> None:
    assert moved(run([at_rate(LOAD, 1)] * 5 + [PROMPTS] * 60)) == [(5 + 2, 2)]
    assert moved(run([OUTPUTS] * 60)) == [(2, -2)]


NEAR = at_rate(PROMPTS, 3.2)  # nearly beyond what three nodes do


def test_while_limits_are_kept_nothing_is_urgent() -> None:
    """Whatever a move would gain."""
    assert 0.85 < pressure(NEAR, COSTS, SLO).worst < 1
    assert moved(run([NEAR] * 30)) == [(10, 1)]


def test_the_more_a_move_gains_the_sooner_it_comes() -> None:
    first = [moved(run([load] * 30))[0][0] for load in (NEAR, LOAD, PROMPTS)]
    assert first == [10, 4, 2]


def test_a_ramp_moves_nodes_one_way_only() -> None:
    ramp = [at_rate(PROMPTS, 2 + index / 30) for index in range(300)]
    moves = moved(run(ramp))
    assert moves
    assert all(move > 0 for _, move in moves)
    assert sum(move for _, move in moves) == 2


def test_a_queue_is_reason_enough() -> None:
    """What came is little by now; what is left of it has to be worked off."""
    load = at_rate(PROMPTS, 2)
    assert pressure(load, COSTS, SLO).worst < 0.85
    behind = replace(load, queued_tokens=24_000)
    service = 0.005 + 0.4 + 0.016
    needed = 2 * service + 60 * service / RECOVER_S
    assert pressure(behind, COSTS, SLO).prefill == pytest.approx(needed / 3)
    assert moved(run([behind] * 9 + [load] * 100))[0][1] > 0


def test_many_that_decode_are_reason_before_one_has_ended() -> None:
    begun = replace(at_rate(LOAD, 2), answers_per_s=0.1, num_decoding=150)
    batch = (0.05 - 0.02) / (450 * 2e-6 + 5e-4)
    assert pressure(begun, COSTS, SLO).decode == pytest.approx(150 / batch / 3)
    assert moved(run([begun] * 5))[0][1] < 0


@pytest.mark.parametrize(
    "bound",
    [{"num_seats": 16}, {"kv_tokens": 16 * 500}, {"num_seats": 16, "kv_tokens": 10**6}],
)
def test_a_node_decodes_no_more_than_it_has_seats_and_memory_for(bound: dict[str, int]) -> None:
    """The limit would allow 21; a step of 16 is shorter, but by its constant dearer for each."""
    full = replace(LOAD, **bound)
    step_s = 0.02 + 16 * (450 * 2e-6 + 5e-4)
    assert pressure(full, COSTS, SLO).decode == pytest.approx(1000 * step_s / 16 / 3)
    assert pressure(full, COSTS, SLO).decode > 1.1 * pressure(LOAD, COSTS, SLO).decode
    waiting = replace(full, num_decoding=100)
    assert pressure(waiting, COSTS, SLO).decode == pytest.approx(100 / 16 / 3)


def test_bounds_beyond_what_the_limit_allows_change_nothing() -> None:
    roomy = replace(LOAD, num_seats=64, kv_tokens=10**6)
    assert pressure(roomy, COSTS, SLO) == pressure(LOAD, COSTS, SLO)


def test_a_node_too_small_for_a_request_counts_as_one_for_each() -> None:
    tiny = replace(LOAD, kv_tokens=10, num_decoding=6)
    assert pressure(tiny, COSTS, SLO).decode == pytest.approx(10 * 100 * (0.02 + 0.0014) / 3)


@pytest.mark.parametrize(("ttft_s", "urgent"), [(0.9, False), (1.1, True)])
def test_a_limit_that_requests_missed_makes_a_wish_urgent(ttft_s: float, urgent: bool) -> None:
    """By the formulas it is just kept; what was measured decides how long to wait."""
    ((at, count),) = moved(run([replace(NEAR, ttft_s=ttft_s)] * 30))
    assert (at < 10, count) == (urgent, 1)


def test_a_limit_that_requests_missed_moves_nothing_by_itself() -> None:
    """Old requests tell of it long after; but an operator should hear what the formulas miss."""
    calm = at_rate(LOAD, 1)
    late = replace(calm, ttft_s=1.25, tpot_s=0.0612)
    said = "yet one request in ten had a TTFT of 1250 ms or a TPOT of 61 ms or more"
    for load, heard in ((calm, ""), (late, said)):
        decision, _ = decide(load, WANTING_PREFILL, 0, COSTS, SLO, LIMITS)
        assert decision.grow == ""
        assert decision.reason.startswith("there is room")
        assert decision.reason.partition("; ")[2] == heard


def test_a_limit_of_the_other_role_makes_no_hurry() -> None:
    assert moved(run([replace(NEAR, tpot_s=1.0)] * 30)) == moved(run([NEAR] * 30))


def test_a_short_burst_moves_nothing() -> None:
    calm = at_rate(LOAD, 1)
    for burst, length in ((NEAR, 10), (LOAD, 4), (PROMPTS, 2)):
        assert not any(run([calm] * 5 + [burst] * length + [calm] * 20))
        assert any(run([calm] * 5 + [burst] * (length + 1) + [calm] * 20))


@pytest.mark.parametrize("every", [1, 2, 3, 5, 8])
def test_swings_are_followed_at_most_once_each_way(every: int) -> None:
    """Twenty of them: a fleet that followed each would move 80 nodes."""
    moves = moved(run(([PROMPTS] * every + [OUTPUTS] * every) * 20))
    assert len(moves) <= 3


def test_who_has_swung_long_ago_is_as_quick_as_before() -> None:
    swings = ([PROMPTS] * 3 + [OUTPUTS] * 3) * 10
    assert moved(run(swings + [LOAD] * 300 + [PROMPTS] * 60))[-1][0] <= 60 + 300 + 3


@pytest.mark.parametrize("load", [LOAD, PROMPTS, OUTPUTS])
def test_a_steady_load_comes_to_rest(load: Observation) -> None:
    """What was moved is never moved back: the margin sees to it."""
    for share in (0.2, 0.5, 1.0, 1.5, 3.0):
        moves = [move for move in run([at_rate(load, 10 * share)] * 300) if move]
        assert len({move > 0 for move in moves}) <= 1
        assert abs(sum(moves)) <= 2


@pytest.mark.parametrize("nodes", [(1, 1), (3, 1)])
def test_the_last_node_of_a_role_stays(nodes: tuple[int, int]) -> None:
    alone = replace(PROMPTS, num_prefill=nodes[0], num_decode=nodes[1])
    decision, _ = decide(alone, WANTING_PREFILL, 0, COSTS, SLO, LIMITS)
    assert decision.grow == ""
    assert "last node" in decision.reason


def test_few_requests_and_little_pressure_move_nothing() -> None:
    few = replace(PROMPTS, num_requests=9)
    calm = at_rate(PROMPTS, 0.1)
    for load, word in ((few, "too few"), (calm, "there is room")):
        decision, state = decide(load, WANTING_PREFILL, 0, COSTS, SLO, LIMITS)
        assert decision.grow == state.wanted == ""
        assert word in decision.reason


@given(
    rate=st.floats(0.01, 1000),
    prompt=st.floats(1, 5000),
    output=st.floats(1, 3000),
    nodes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    queued=st.integers(0, 10**6),
    decoding=st.integers(0, 10**4),
)
def test_a_move_always_lowers_the_greater_pressure(
    rate: float, prompt: float, output: float, nodes: tuple[int, int], queued: int, decoding: int
) -> None:
    means = (prompt, prompt**2, output, prompt + output / 2)
    load = Observation(rate, rate, *means, 99, *nodes, queued, decoding)
    before = pressure(load, COSTS, SLO)
    for role in ("prefill", "decode"):
        decision, _ = decide(load, State(role, -100), 0, COSTS, SLO, LIMITS)
        if decision.grow:
            step = decision.count if decision.grow == "prefill" else -decision.count
            after = replace(load, num_prefill=nodes[0] + step, num_decode=nodes[1] - step)
            assert min(after.num_prefill, after.num_decode) >= 1
            assert pressure(after, COSTS, SLO).worst < before.worst


# ---------------------------------------------------------------- what should never be


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests_per_s": float("nan")},
        {"requests_per_s": float("inf")},
        {"prompt_tokens": float("nan")},
        {"output_tokens": float("nan")},
        {"answers_per_s": float("nan"), "num_decoding": 0},
    ],
)
def test_what_is_no_number_moves_nothing(wrong: dict[str, float]) -> None:
    load = replace(PROMPTS, **wrong)  # type: ignore[arg-type]
    for state in (WANTING_PREFILL, State("decode", -100)):
        decision, _ = decide(load, state, 0, COSTS, SLO, LIMITS)
        assert decision.grow == ""


def test_limits_that_hold_nothing_back_and_work_that_takes_no_time() -> None:
    loose = pressure(PROMPTS, COSTS, Slo(float("inf"), float("inf")))
    assert loose.prefill == pytest.approx(10 * (0.005 + 0.4 + 0.016) / 3)
    assert loose.decode == pytest.approx(10 * 10 * (450 * 2e-6 + 5e-4) / 3)
    nothing = Costs(LatencyModel((0, 0, 0), (0, 0, 0), (0, 0)))
    assert pressure(LOAD, nothing, SLO) == Pressure(0.0, 0.0)
    decision, _ = decide(LOAD, WANTING_PREFILL, 0, nothing, SLO, LIMITS)
    assert "there is room" in decision.reason
    cached = replace(LOAD, prompt_tokens=0.0, prompt_squares=0.0)
    assert pressure(cached, COSTS, SLO).prefill > 0  # a step each


def test_an_empty_window_moves_nothing() -> None:
    empty = Observed(window_s=10, began=0).look(100, Standing(3, 3))
    assert empty.requests_per_s == empty.output_tokens == empty.context_tokens == 0
    decision, state = decide(empty, WANTING_PREFILL, 100, COSTS, SLO, LIMITS)
    assert (decision.grow, decision.pressure, state.wanted) == ("", None, "")
    none_too_few = replace(LIMITS, min_requests=0)
    decision, _ = decide(empty, WANTING_PREFILL, 100, COSTS, SLO, none_too_few)
    assert decision.grow == ""


@pytest.mark.parametrize(("lost", "nodes"), [("prefill", (0, 4)), ("decode", (4, 0))])
def test_a_role_that_has_lost_its_last_node_gets_others(lost: str, nodes: tuple[int, int]) -> None:
    load = replace(LOAD, num_prefill=nodes[0], num_decode=nodes[1])
    decision, _ = decide(load, State(lost, -100), 0, COSTS, SLO, LIMITS)
    assert decision.grow == lost
    assert 1 <= decision.count < 4


@pytest.mark.parametrize("nodes", [(0, 0), (0, 1), (1, 0)])
def test_nobody_is_left_to_move(nodes: tuple[int, int]) -> None:
    """All of them are just changing, or gone."""
    load = replace(LOAD, num_prefill=nodes[0], num_decode=nodes[1])
    for role in ("prefill", "decode"):
        decision, _ = decide(load, State(role, -100), 0, COSTS, SLO, LIMITS)
        assert decision.grow == ""


# ---------------------------------------------------------------- what was seen


PAIR = Standing(num_prefill=1, num_decode=1)


def test_the_window_moves_on() -> None:
    observed = Observed(window_s=10, began=0)
    for second in range(20):
        observed.arrived(second, prompt_tokens=100 if second < 15 else 300)
        observed.ended(second, prompt_tokens=100, output_tokens=20)
    seen = observed.look(20, Standing(2, 1, queued_tokens=7, num_decoding=3))
    assert (seen.num_requests, seen.requests_per_s, seen.answers_per_s) == (10, 1.0, 1.0)
    assert seen.prompt_tokens == 200
    assert seen.prompt_squares == (100**2 + 300**2) / 2
    assert (seen.output_tokens, seen.context_tokens) == (20, 110)
    assert (seen.num_prefill, seen.num_decode) == (2, 1)
    assert (seen.queued_tokens, seen.num_decoding) == (7, 3)
    assert observed.look(40, PAIR).num_requests == 0


def test_of_many_requests_the_last_seconds_tell() -> None:
    observed = Observed(window_s=30, began=0)
    for tenth in range(300):
        observed.arrived(tenth / 10, prompt_tokens=100 if tenth < 250 else 500)
        observed.ended(tenth / 10, prompt_tokens=100, output_tokens=20 if tenth < 250 else 70)
    seen = observed.look(30, PAIR)
    assert (seen.requests_per_s, seen.answers_per_s) == (10.0, 10.0)
    assert (seen.prompt_tokens, seen.output_tokens) == (500, 70)


def test_no_fewer_than_enough_tell() -> None:
    """One in a second: thirty seconds of them, though five are recent."""
    observed = Observed(window_s=60, began=0)
    for second in range(60):
        observed.arrived(second, prompt_tokens=10)
        observed.ended(second, 10, 10)
    assert observed.look(60, PAIR).num_requests == 30
    assert observed.look(60, PAIR).requests_per_s == 1.0


def test_nothing_is_judged_before_answers_have_ended() -> None:
    observed = Observed(window_s=60, began=0)
    for _ in range(50):
        observed.arrived(1, 10)
    assert observed.look(2, PAIR).num_requests == 0


def test_the_rate_of_a_young_window_is_over_its_age() -> None:
    observed = Observed(window_s=60, began=100)
    for _ in range(6):
        observed.arrived(102, 10)
    assert observed.look(103, PAIR).requests_per_s == 2.0
    assert observed.look(103, PAIR).context_tokens == 10  # nothing ended: the prompt is known


def test_what_nine_in_ten_did_not_exceed() -> None:
    observed = Observed(window_s=60, began=0)
    assert (observed.look(1, PAIR).ttft_s, observed.look(1, PAIR).tpot_s) == (0.0, 0.0)
    for number in range(1, 11):
        tpot_s = None if number == 1 else number / 1000  # a single token has none
        observed.ended(1, 10, 10, ttft_s=number / 10, tpot_s=tpot_s)
    seen = observed.look(2, PAIR)
    assert (seen.ttft_s, seen.tpot_s) == (0.9, 0.009)


def test_what_a_cache_has_is_taken_off() -> None:
    observed = Observed(window_s=60, began=0)
    observed.arrived(1, 400)
    observed.ended(2, prompt_tokens=400, output_tokens=8, cached_tokens=300)
    seen = observed.look(3, PAIR)
    assert (seen.prompt_tokens, seen.context_tokens) == (100, 404)
    assert seen.prompt_squares == 40_000
