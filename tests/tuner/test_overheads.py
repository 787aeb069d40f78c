"""What a fleet takes besides its engines' steps: found again where it is known, and asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.tuner.conftest import FakeServer
from tuner.latency import LatencyModel, StepWork
from tuner.overheads import Alone, Overheads, Probes, Streams, overheads_of, prefill_s
from tuner.probe import BATCHES, LENGTHS, REPEATS, check, gaps_between, probe, step_between
from tuner.record import RequestRecord
from wire.errors import ConfigError

MODEL = LatencyModel((0.010, 1e-3, 1e-8), (0.020, 1e-6, 1e-3), (0.001, 1e-10))
TRUE = Overheads(0.007, 0.004, 0.002, 0.0005, 1.1, prefill_slowdown=1.3, decode_slowdown=1.2)
CHUNK, HOP_S, HANDOFF_HOP_S = 256, 0.002, 0.001


def probes_of(true: Overheads) -> Probes:
    """What somebody would measure whose fleet is exactly so."""
    real = true.applied(MODEL)
    alone = [
        Alone(
            n,
            true.front_s + HOP_S + prefill_s(real, n, CHUNK),
            true.handoff_s + HANDOFF_HOP_S + real.decode_steps_s(1, 1, n + 1),
        )
        for n in (32, 128, 600)
    ]
    streams = [Streams(k, 40 * k, real.decode_steps_s(1, k, 40 * k)) for k in (1, 4, 16)]
    gaps = [prefill_s(real, CHUNK, CHUNK)] * 3
    return Probes(alone, gaps, CHUNK, streams, true.prefill_slowdown, true.decode_slowdown)


def test_what_is_there_is_found() -> None:
    found = overheads_of(probes_of(TRUE), MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    assert asdict(found) == pytest.approx(asdict(TRUE))


def test_noise_below_nothing_is_nothing() -> None:
    quick = probes_of(Overheads())
    found = overheads_of(quick, MODEL, CHUNK, 2 * HOP_S, 2 * HANDOFF_HOP_S)
    assert (found.front_s, found.handoff_s) == (0.0, 0.0)
    at_once = replace(quick, in_a_row_s=[0.0])  # read together: nobody knows
    found = overheads_of(at_once, MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    assert found.prefill_factor == pytest.approx(1.0)
    faster = Probes(quick.alone, quick.in_a_row_s, CHUNK, quick.streams, 0.9, 0.97)
    found = overheads_of(faster, MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    assert not found.shares_machine


@pytest.mark.parametrize("pace", [0.8, 1.25])
def test_a_machine_that_has_become_slower_is_no_work_per_request(pace: float) -> None:
    """While prompts were asked for alone; a fifth of a long one's time would be 0.14 s."""
    probes = probes_of(TRUE)
    alone = [replace(one, ttft_s=pace * one.ttft_s) for one in probes.alone]
    for gaps in (probes.in_a_row_s, []):
        drifted = replace(probes, alone=alone, in_a_row_s=gaps)
        found = overheads_of(drifted, MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
        assert found.front_s == pytest.approx(TRUE.front_s, abs=0.004)


def test_of_one_prompt_the_formula_is_believed() -> None:
    probes = replace(probes_of(replace(TRUE, prefill_factor=1.0)), in_a_row_s=[])
    found = overheads_of(replace(probes, alone=probes.alone[:1]), MODEL, CHUNK, HOP_S, 0.0)
    assert found.prefill_factor == 1.0
    assert found.front_s == pytest.approx(TRUE.front_s)


def disturbed(probes: Probes, slower: Sequence[float] = (1.0, 1.6, 1.0, 9.0, 1.01)) -> Probes:
    """Of each kind five are asked; two of them while somebody else computes."""
    return replace(
        probes,
        alone=[
            Alone(one.prompt_tokens, f * one.ttft_s, f * one.second_s)
            for f in slower
            for one in probes.alone
        ],
        in_a_row_s=[f * gap for f in slower for gap in probes.in_a_row_s],
        streams=[replace(one, step_s=f * one.step_s) for f in slower for one in probes.streams],
    )


def test_two_in_five_that_were_disturbed_change_nothing() -> None:
    probes = probes_of(TRUE)
    found = overheads_of(disturbed(probes), MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    middle = overheads_of(disturbed(probes, (1.01,)), MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    assert asdict(found) == pytest.approx(asdict(middle), rel=1e-6)


def test_the_spread_of_repeats_is_told() -> None:
    assert probes_of(TRUE).spread == 0.0
    assert disturbed(probes_of(TRUE)).spread == pytest.approx(0.6 / 1.01)


def test_one_size_of_batch_tells_no_slope() -> None:
    real = TRUE.applied(MODEL)
    probes = probes_of(TRUE)
    same = [Streams(4, 100, real.decode_steps_s(1, 4, 100))] * 2
    one = Probes(probes.alone, probes.in_a_row_s, CHUNK, same, 1.0, 1.0)
    found = overheads_of(one, MODEL, CHUNK, HOP_S, HANDOFF_HOP_S)
    assert found.step_s == pytest.approx(0.002 + 4 * 0.0005)
    assert found.stream_s == 0.0


def test_a_factor_on_decode_steps_counts_what_is_on_top_of_them_too() -> None:
    plain, slower = (replace(TRUE, decode_factor=f).applied(MODEL) for f in (1.0, 1.5))
    assert slower.decode == pytest.approx([1.5 * value for value in plain.decode])
    assert slower.prefill == plain.prefill


def test_no_formula_falls_below_nothing() -> None:
    found = Overheads(step_s=-1.0, stream_s=-1.0).applied(MODEL)
    assert found.decode == (0.0, MODEL.decode[1], 0.0)
    assert found.step_s(StepWork(prefill_tokens=10)) == MODEL.step_s(StepWork(prefill_tokens=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"front_s": -1.0},
        {"handoff_s": float("nan")},
        {"step_s": 100.0},
        {"prefill_factor": 0.0},
        {"decode_factor": float("inf")},
        {"decode_slowdown": 0.5},
    ],
)
def test_overheads_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"are no|is no|not slower"):
        Overheads(**wrong)


def test_only_gaps_within_the_spans_count() -> None:
    record = RequestRecord(0, 0.0, 0.0, 9.0, (1.0, 2.0, 4.0, 5.0, 9.0), 1, 5)
    assert gaps_between([record], [(0.0, 2.5), (3.5, 5.0)]) == [1.0, 1.0]


def test_a_step_is_told_by_tokens_though_chunks_come_in_clumps() -> None:
    clumps = RequestRecord(0, 0.0, 0.0, 9.0, (1.0, 1.0, 3.0, 3.0, 5.0), 1, 5)
    assert step_between([clumps], [(0.0, 9.0)]) == pytest.approx(1.0)
    silent = RequestRecord(0, 0.0, 0.0, 9.0, (1.0, 2.0, 4.0, 5.0), 1, 5)  # one without a text
    assert step_between([silent], [(0.0, 9.0)]) == pytest.approx(1.0)
    assert step_between([silent], [(6.0, 9.0)]) == 0.0


PAIR = "prefill decode"


def a_fleet(mode: str = "always", serving: str = PAIR, others: str = "", busy: int = 0) -> Any:
    """What a router tells of its nodes."""
    kinds = {"serving": serving, "draining": others}
    nodes = [{"role": role, "state": state} for state in kinds for role in kinds[state].split()]
    return {"handoff": {"mode": mode}, "nodes": nodes, "running": busy, "waiting": 0}


def test_a_fleet_is_asked_for_everything(server: FakeServer) -> None:
    told: list[str] = []
    server.fleets = [a_fleet()]
    server.pause_s = 0.001
    found = asyncio.run(probe(server.url, "first", 64, 256, told.append))
    fitting = [n for n in LENGTHS if n < 256 - 8]
    assert [one.prompt_tokens for one in found.alone] == [
        n for _ in range(REPEATS) for n in fitting
    ]
    batches = {one.batch for one in found.streams}
    assert batches <= set(BATCHES)  # a server this quick may end one stream before the next begins
    assert batches
    assert found.in_a_row_tokens == 64
    assert len(told) == 4


def test_it_can_be_measured_twice(server: FakeServer) -> None:
    """The same prompts would be in its caches."""
    server.fleets = [a_fleet()]
    asked = []
    for _ in range(2):
        asyncio.run(probe(server.url, "first", 64, 64, lambda _: None))
        asked.append({tuple(body["prompt"]) for body in server.bodies})
        server.bodies.clear()
    assert not asked[0] & asked[1]


def test_a_fleet_that_is_no_pair_of_its_own_is_not_measured(server: FakeServer) -> None:
    """It would take two minutes and say what holds for nobody."""
    for told, said in (
        (a_fleet("auto"), "with --handoff auto prompts may be computed where they are answered"),
        (a_fleet("never"), "with --handoff never"),
        (
            a_fleet(serving="prefill decode decode"),
            "one decode node, it has 2 decode, 1",
        ),
        (a_fleet(serving="prefill", others="decode"), "it has 1 prefill;"),
        (a_fleet(serving="mixed"), "it has 1 mixed"),
        (a_fleet(serving=""), "it has none"),
        (a_fleet(busy=2), "not idle, 2 requests"),
        ({"nodes": 5}, "not that of a Baton router"),
        (None, "it has no /debug/fleet"),
    ):
        server.fleets = [] if told is None else [told]
        with pytest.raises(ConfigError) as refused:
            asyncio.run(check(server.url, "first"))
        assert said in str(refused.value)
        assert "`baton serve MODEL --prefill 1 --decode 1 --handoff always`" in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not server.bodies, "nothing was measured"
    server.fleets = [a_fleet(others="prefill")]
    asyncio.run(check(server.url, "first"))


def test_a_fleet_that_fails_tells_no_overheads(server: FakeServer) -> None:
    server.fleets = [a_fleet()]
    server.fault = "busy"
    with pytest.raises(ConfigError, match="http_503: busy"):
        asyncio.run(probe(server.url, "first", 64, 256, lambda _: None))
    with pytest.raises(ConfigError, match="does not serve"):
        asyncio.run(probe(server.url, "other", 64, 256, lambda _: None))
