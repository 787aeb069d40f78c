"""The online tuner in simulated fleets: against every static split, and at rest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import Simulated, simulate
from baton.simulation.tuned import Tuning
from engine.config import EngineConfig
from tests.simulation.test_simulate import BLOCK, LAYOUT
from tuner.goodput import Slo, attainment
from tuner.latency import LatencyModel
from tuner.online import Limits
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
TUNING = Tuning(SLO, Limits(hold_s=4, pause_s=5), window_s=15)
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


def good(run: Simulated, phase: int | None = None) -> float:
    """The share of a phase's requests, or of all, that kept both limits."""
    records = [r for r in run.records if phase is None or r.due // PHASE_S == phase]
    return attainment(records, SLO).good


def test_it_beats_every_static_split_when_the_work_changes() -> None:
    trace = phases(PROMPTS, OUTPUTS)
    static = [
        simulate(replace(SETUP, split=Split(n, 6 - n), tuning=None), trace) for n in (2, 3, 4)
    ]
    tuned = simulate(SETUP, trace)
    assert len(tuned.records) == len(trace.requests)
    assert not any(record.error for record in tuned.records)
    for phase in (0, 1):
        assert good(tuned, phase) >= 0.9 * max(good(run, phase) for run in static)
    assert good(tuned) > 1.2 * max(map(good, static))
    assert {move.role for move in tuned.moves if move.at < PHASE_S} == {Role.PREFILL}
    later = {move.role for move in tuned.moves if move.at > PHASE_S + 10}
    assert later == {Role.DECODE}


def test_a_balanced_load_is_left_alone() -> None:
    assert simulate(SETUP, phases(BOTH)).moves == ()


def test_swings_faster_than_its_patience_do_not_drive_it_to_and_fro() -> None:
    """Ten swings; a fleet that followed each of them would move 20 nodes and more."""
    trace = phases(*[PROMPTS, OUTPUTS] * 5, phase_s=6)
    patient = replace(TUNING, limits=Limits(), window_s=30)
    moves = simulate(replace(SETUP, tuning=patient), trace).moves
    assert len(moves) <= 2


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
