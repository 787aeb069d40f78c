"""The online tuner in simulated fleets: against every static split, and at rest."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import Simulated, simulate
from baton.simulation.tuned import Known, Move, Tuning
from engine.config import EngineConfig
from tests.simulation.test_simulate import BLOCK, LAYOUT
from tuner.goodput import Slo, attainment
from tuner.latency import LatencyModel
from tuner.trace import Trace, TracedRequest
from wire.types import Role

MODEL = LatencyModel((0.005, 5e-4, 1e-8), (0.010, 1e-6, 1e-3), (0.002, 1e-9))
ENGINE = EngineConfig(
    block_size=BLOCK,
    num_blocks=4000,
    max_model_len=4096,
    max_num_seqs=64,
    max_num_batched_tokens=512,
)
SLO = Slo(ttft_s=1.5, tpot_s=0.03)
TUNING = Tuning(SLO)
SETUP = Setup(Split(prefill=3, decode=3), ENGINE, LAYOUT, MODEL, tuning=TUNING)
PHASE_S = 100
PROMPTS = (5.3, 1000, 20)  # requests per second, prompt and output tokens
OUTPUTS = (6.5, 100, 250)
BOTH = (3.0, 600, 100)


def phases(*kinds: tuple[float, int, int], phase_s: float = PHASE_S) -> Trace:
    rng = random.Random(7)
    rows = [row for i, kind in enumerate(kinds) for row in _phase(rng, i * phase_s, phase_s, *kind)]
    return Trace("phases", tuple(rows))


def _phase(
    rng: random.Random, start: float, seconds: float, rate: float, prompt: int, output: int
) -> Iterator[TracedRequest]:
    at = start + rng.expovariate(rate)
    while at < start + seconds:
        num_prompt, num_output = (
            max(2, int(mean * rng.uniform(0.5, 1.5))) for mean in (prompt, output)
        )
        yield TracedRequest(at, num_prompt, num_output)
        at += rng.expovariate(rate)


def good(run: Simulated, phase: int | None = None, phase_s: float = PHASE_S) -> float:
    """The share of a phase's requests, or of all, that kept both limits."""
    records = [r for r in run.records if phase is None or r.due // phase_s == phase]
    return attainment(records, SLO).good


def turns(moves: Sequence[Move]) -> int:
    """How often nodes went the other way than those before them."""
    return sum(before.role is not move.role for before, move in pairwise(moves))


@pytest.mark.parametrize(("phase_s", "overall"), [(40, 1.1), (PHASE_S, 1.2)])
def test_it_beats_every_static_split_when_the_work_changes(phase_s: int, overall: float) -> None:
    trace = phases(PROMPTS, OUTPUTS, phase_s=phase_s)
    static = [
        simulate(replace(SETUP, split=Split(n, 6 - n), tuning=None), trace) for n in (2, 3, 4)
    ]
    tuned = simulate(SETUP, trace)
    assert len(tuned.records) == len(trace.requests)
    assert not any(record.error for record in tuned.records)
    for phase in (0, 1):
        best = max(good(run, phase, phase_s) for run in static)
        assert good(tuned, phase, phase_s) >= 0.9 * best
    assert good(tuned) > overall * max(map(good, static))
    assert {move.role for move in tuned.moves if move.at < phase_s} == {Role.PREFILL}
    assert {move.role for move in tuned.moves if move.at > phase_s} == {Role.DECODE}
    assert all(pressure.worst > 0 for _, pressure in tuned.looks)


def test_it_is_nearly_as_good_as_who_knows_what_comes() -> None:
    trace = phases(PROMPTS, OUTPUTS, phase_s=40)
    known = Known(((0.0, Role.PREFILL, 1), (40.0, Role.DECODE, 2)))
    best, tuned = (simulate(replace(SETUP, tuning=who), trace) for who in (known, TUNING))
    assert [(move.at, move.role) for move in best.moves] == [
        (0.0, Role.PREFILL),
        (40.0, Role.DECODE),
        (40.0, Role.DECODE),
    ]
    assert good(tuned) >= 0.9 * good(best)


def test_a_balanced_load_is_left_alone() -> None:
    assert simulate(SETUP, phases(BOTH)).moves == ()


def test_swings_faster_than_its_patience_do_not_drive_it_to_and_fro() -> None:
    """Ten swings; a fleet that followed each of them would turn nine times."""
    moves = simulate(SETUP, phases(*[PROMPTS, OUTPUTS] * 5, phase_s=6)).moves
    assert turns(moves) <= 1
    assert len({move.at for move in moves}) <= 3


def test_a_node_that_moves_keeps_its_requests_and_its_name() -> None:
    run = simulate(SETUP, phases(PROMPTS))
    assert run.moves
    assert all(record.error is None for record in run.records)
    assert sorted(run.busy) == sorted(
        [*(f"prefill-{n}" for n in range(3)), *(f"decode-{n}" for n in range(3))]
    )


def test_colocated_fleets_have_nothing_to_tune() -> None:
    with pytest.raises(ValueError, match="tuning"):
        simulate(replace(SETUP, split=Split(mixed=2)), phases(BOTH, phase_s=1))
