"""The online tuner's decision: where pressure is, when it moves a node, and when it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.observed import Observed
from tuner.online import IMPOSSIBLE, Limits, Observation, State, decide, pressure

MODEL = LatencyModel(prefill=(0.005, 1e-3, 1e-7), decode=(0.02, 2e-6, 5e-4), transfer=(0.001, 1e-9))
SLO = Slo(ttft_s=1.0, tpot_s=0.05)
LIMITS = Limits(hold_s=10, pause_s=30)
LOAD = Observation(
    requests_per_s=10,
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
    found = pressure(LOAD, MODEL, SLO)
    assert found.prefill == pytest.approx(10 * service * (1 + waits) / waits / 3)
    assert found.decode == pytest.approx(10 * 100 / (batch / 0.05) / 3)


def test_more_nodes_of_a_role_press_less() -> None:
    more = pressure(replace(LOAD, num_prefill=6), MODEL, SLO)
    assert more.prefill == pytest.approx(pressure(LOAD, MODEL, SLO).prefill / 2)
    assert more.decode == pressure(LOAD, MODEL, SLO).decode


@pytest.mark.parametrize("slo", [Slo(0.3, 0.05), Slo(1.0, 0.02)])
def test_a_limit_below_an_empty_fleets_time_cannot_be_kept(slo: Slo) -> None:
    assert pressure(LOAD, MODEL, slo).worst >= IMPOSSIBLE / 3


def run(loads: list[Observation], every_s: float = 1.0, limits: Limits = LIMITS) -> list[str]:
    """What is decided at each look; a move changes the nodes of all later ones."""
    state, moves, prefill = State(), [], 0
    for index, load in enumerate(loads):
        seen = replace(
            load, num_prefill=load.num_prefill + prefill, num_decode=load.num_decode - prefill
        )
        decision, state = decide(seen, state, index * every_s, MODEL, SLO, limits)
        prefill += {"prefill": 1, "decode": -1, "": 0}[decision.grow]
        moves.append(decision.grow)
    return moves


PROMPTS = replace(LOAD, output_tokens=10)  # all the work is in prompts
OUTPUTS = replace(LOAD, prompt_tokens=40, prompt_squares=1600, output_tokens=400)


def test_a_lasting_need_moves_one_node_at_a_time() -> None:
    moves = run([PROMPTS] * 60)
    assert [index for index, move in enumerate(moves) if move] == [10, 40]
    assert set(moves) == {"", "prefill"}


def test_decode_gets_nodes_too() -> None:
    assert [move for move in run([OUTPUTS] * 60) if move] == ["decode", "decode"]


def test_a_short_burst_moves_nothing() -> None:
    calm = replace(LOAD, requests_per_s=1)
    assert not any(run([calm] * 5 + [PROMPTS] * 9 + [calm] * 20))


def test_a_load_that_swings_faster_than_the_hold_moves_nothing() -> None:
    assert not any(run(([PROMPTS] * 6 + [OUTPUTS] * 6) * 20))


@pytest.mark.parametrize("load", [LOAD, PROMPTS, OUTPUTS])
def test_a_steady_load_comes_to_rest(load: Observation) -> None:
    """What was moved is never moved back: the margin sees to it."""
    for share in (0.2, 0.5, 1.0, 1.5, 3.0):
        moves = [move for move in run([replace(load, requests_per_s=10 * share)] * 300) if move]
        assert len(set(moves)) <= 1
        assert len(moves) <= 2


def test_the_last_node_of_a_role_stays() -> None:
    alone = replace(PROMPTS, num_prefill=1, num_decode=1)
    decision, _ = decide(alone, State("prefill", -100), 0, MODEL, SLO, LIMITS)
    assert decision.grow == ""
    assert "last node" in decision.reason


def test_few_requests_and_little_pressure_move_nothing() -> None:
    few = replace(PROMPTS, num_requests=9)
    calm = replace(PROMPTS, requests_per_s=0.1)
    for load, word in ((few, "too few"), (calm, "there is room")):
        decision, state = decide(load, State("prefill", -100), 0, MODEL, SLO, LIMITS)
        assert decision.grow == state.wanted == ""
        assert word in decision.reason


@given(
    rate=st.floats(0.01, 1000),
    prompt=st.floats(1, 5000),
    output=st.floats(1, 3000),
    nodes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_a_move_always_lowers_the_greater_pressure(
    rate: float, prompt: float, output: float, nodes: tuple[int, int]
) -> None:
    load = Observation(rate, prompt, prompt**2, output, prompt + output / 2, 99, *nodes)
    before = pressure(load, MODEL, SLO)
    grow = decide(load, State("prefill", -100), 0, MODEL, SLO, LIMITS)[0].grow
    grow = grow or decide(load, State("decode", -100), 0, MODEL, SLO, LIMITS)[0].grow
    if grow:
        step = 1 if grow == "prefill" else -1
        moved = replace(load, num_prefill=nodes[0] + step, num_decode=nodes[1] - step)
        assert pressure(moved, MODEL, SLO).worst < before.worst


# ---------------------------------------------------------------- what was seen


def test_the_window_moves_on() -> None:
    observed = Observed(window_s=10, began=0)
    for second in range(20):
        observed.arrived(second, prompt_tokens=100 if second < 15 else 300)
        observed.ended(second, prompt_tokens=100, output_tokens=20)
    seen = observed.look(20, num_prefill=2, num_decode=1)
    assert (seen.num_requests, seen.requests_per_s) == (10, 1.0)
    assert seen.prompt_tokens == 200
    assert seen.prompt_squares == (100**2 + 300**2) / 2
    assert (seen.output_tokens, seen.context_tokens) == (20, 110)
    assert (seen.num_prefill, seen.num_decode) == (2, 1)
    assert observed.look(40, 2, 1).num_requests == 0


def test_the_rate_of_a_young_window_is_over_its_age() -> None:
    observed = Observed(window_s=60, began=100)
    for _ in range(6):
        observed.arrived(102, 10)
    assert observed.look(103, 1, 1).requests_per_s == 2.0
    assert observed.look(103, 1, 1).context_tokens == 10  # nothing ended: the prompt is known


def test_what_a_cache_has_is_taken_off() -> None:
    observed = Observed(window_s=60, began=0)
    observed.arrived(1, 400)
    observed.ended(2, prompt_tokens=400, output_tokens=8, cached_tokens=300)
    seen = observed.look(3, 1, 1)
    assert (seen.prompt_tokens, seen.context_tokens) == (100, 404)
    assert seen.prompt_squares == 40_000
