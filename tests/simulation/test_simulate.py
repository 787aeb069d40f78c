"""Simulated fleets: times that can be computed by hand, prefixes, contention, failures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton.simulation.clock import VirtualClock
from baton.simulation.fleet_run import FleetRun
from baton.simulation.names import PrefixNames
from baton.simulation.setup import ALWAYS, Failure, Setup, Split
from baton.simulation.simulate import simulate
from engine.config import EngineConfig
from router.way import Rules
from tuner.latency import LatencyModel
from tuner.record import RequestRecord
from tuner.trace import Trace, TracedRequest
from wire.layout import KVLayout

BLOCK = 16
MODEL = LatencyModel((0.010, 1e-4, 1e-8), (0.008, 1e-6, 1e-3), (0.002, 1e-8))
LAYOUT = KVLayout(2, 2, 16, BLOCK, "float32")
ENGINE = EngineConfig(
    block_size=BLOCK,
    num_blocks=400,
    max_model_len=4096,
    max_num_seqs=16,
    max_num_batched_tokens=256,
)
SETUP = Setup(Split(prefill=1, decode=1), ENGINE, LAYOUT, MODEL, hop_s=0.001)


def trace(*requests: tuple[float, int, int], block_len: int = 0) -> Trace:
    return Trace("made", tuple(TracedRequest(*request) for request in requests), block_len)


def steady(number: int, rate: float, input_len: int = 100, output_len: int = 20) -> Trace:
    return trace(*((i / rate, input_len, output_len) for i in range(number)))


def only(records: list[RequestRecord]) -> RequestRecord:
    (record,) = records
    assert record.error is None
    return record


def test_the_clock_keeps_order() -> None:
    clock, seen = VirtualClock(), []
    for time, name in ((2.0, "c"), (1.0, "a"), (1.0, "b")):
        clock.at(time, lambda name=name: seen.append((clock.now, name)))  # type: ignore[misc]
    while clock.step():
        pass
    assert seen == [(1.0, "a"), (1.0, "b"), (2.0, "c")]


def test_one_request_takes_what_the_formulas_say() -> None:
    """Reserve, grant, prefill and token are four hops; then transfer, commit, and the steps."""
    record = only(simulate(SETUP, trace((0.0, 100, 5))).records)
    prefill = 0.010 + 1e-4 * 100 + 1e-8 * 100**2
    assert record.ttft == pytest.approx(3 * 0.001 + prefill + 0.001)
    transfer = MODEL.transfer_s(7 * LAYOUT.block_bytes)
    decode = MODEL.decode_steps_s(4, 1, 101)
    assert record.tpot is not None
    assert record.tpot * 4 == pytest.approx(transfer + 0.001 + decode)


def test_colocated_requests_wait_for_no_transfer() -> None:
    setup = replace(SETUP, split=Split(mixed=1))
    record = only(simulate(setup, trace((0.0, 100, 5))).records)
    assert record.tpot == pytest.approx(MODEL.decode_steps_s(4, 1, 101) / 4)


def test_colocated_decodes_suffer_from_prompts() -> None:
    requests = ((0.0, 50, 40), *((0.1 * i, 1000, 2) for i in range(1, 4)))
    found = {}
    for split in (Split(prefill=1, decode=1), Split(mixed=1)):
        setup = replace(SETUP, split=split)
        records = simulate(setup, trace(*requests)).records
        found[split] = next(record.tpot for record in records if record.index == 0)
    apart, together = found.values()
    assert apart is not None
    assert together is not None
    assert together > 1.5 * apart


def test_chunks_are_the_schedulers() -> None:
    """Three chunks pay the constant three times; what the last one leaves goes over the link."""
    record = only(simulate(SETUP, trace((0.0, 600, 2))).records)
    prefill = 3 * 0.010 + 1e-4 * 600 + 1e-8 * 600**2
    assert record.ttft == pytest.approx(4 * 0.001 + prefill)
    last_chunk = MODEL.transfer_s((38 - 32) * LAYOUT.block_bytes)
    assert record.tpot == pytest.approx(last_chunk + 0.001 + MODEL.decode_steps_s(1, 1, 601))


def test_equal_ids_hit_the_cache() -> None:
    ids = tuple(range(8))
    twice = Trace(
        "made",
        (TracedRequest(0.0, 128, 4, ids), TracedRequest(5.0, 128, 4, ids)),
        block_len=16,
    )
    first, second = simulate(SETUP, twice).records
    assert first.ttft is not None
    assert second.ttft is not None
    # The last block is computed again: its logits are needed.
    saved = 1e-4 * 112 + 1e-8 * 112**2
    assert first.ttft - second.ttft == pytest.approx(saved)
    others = Trace("made", (twice.requests[0], replace(twice.requests[1], block_ids=())), 16)
    first, second = simulate(SETUP, others).records
    assert first.ttft == pytest.approx(second.ttft)


def test_names_are_equal_for_equal_prefixes_only() -> None:
    names = PrefixNames(block_size=16, trace_block_len=24)
    one = names.of(0, TracedRequest(0.0, 80, 1, (1, 2, 3)))
    same = names.of(1, TracedRequest(0.0, 80, 1, (1, 2, 3)))
    fork = names.of(2, TracedRequest(0.0, 80, 1, (1, 5, 3)))
    assert one[:4] == same[:4]
    assert one[4] != same[4]  # beyond the 72 named tokens
    assert [a == b for a, b in zip(one, fork, strict=True)] == [True, False, False, False, False]
    assert len(set(one)) == len(one) == 5


def test_transfers_wait_for_each_other() -> None:
    slow = replace(MODEL, transfer=(1.0, 0.0))
    setup = replace(SETUP, model=slow, split=Split(prefill=2, decode=1))
    records = simulate(setup, trace((0.0, 64, 2), (0.0, 64, 2))).records
    ends = sorted(record.end for record in records)
    assert ends[1] - ends[0] == pytest.approx(1.0, abs=0.05)


def test_every_request_ends_and_the_books_are_right() -> None:
    run = FleetRun(replace(SETUP, split=Split(prefill=2, decode=2)), steady(200, 30.0))
    records = run.run()
    assert sorted(record.index for record in records) == list(range(200))
    assert all(record.error is None for record in records)
    while run.clock.now < records[-1].end + 1.0:  # let the last messages arrive
        run.clock.step()
    for node in run.nodes.values():
        node.engine.check_integrity()
        load = node.engine.load()
        assert (load.num_running, load.num_waiting, load.blocks_promised) == (0, 0, 0)
        assert load.blocks_free == ENGINE.num_blocks


def test_the_same_run_twice_is_the_same() -> None:
    setup = replace(SETUP, split=Split(prefill=1, decode=3))
    assert simulate(setup, steady(150, 40.0)) == simulate(setup, steady(150, 40.0))


def test_too_little_memory_delays_and_loses_nothing() -> None:
    small = replace(SETUP, engine=replace(ENGINE, num_blocks=20))
    crowded = simulate(small, steady(40, 50.0)).records
    roomy = simulate(SETUP, steady(40, 50.0)).records
    assert all(record.error is None for record in crowded)
    assert max(r.end for r in crowded) > max(r.end for r in roomy)


@pytest.mark.parametrize("split", [Split(prefill=1, decode=1), Split(mixed=1)])
def test_what_fits_nowhere_is_refused(split: Split) -> None:
    small = replace(SETUP, split=split, engine=replace(ENGINE, num_blocks=20), node_timeout_s=9.0)
    records = simulate(small, trace((0.0, 400, 20), (0.1, 50, 5))).records
    assert [bool(record.error) for record in sorted(records, key=lambda r: r.index)] == [
        True,
        False,
    ]


@pytest.mark.parametrize("dies", ["prefill-0", "decode-0"])
def test_a_death_costs_time_and_no_request(dies: str) -> None:
    split = Split(prefill=2, decode=2)
    load = steady(120, 30.0)
    well = simulate(replace(SETUP, split=split), load).records
    setup = replace(SETUP, split=split, failures=(Failure(dies, 1.0),))
    records = simulate(setup, load).records
    assert len(records) == 120
    assert all(record.error is None for record in records)
    assert max(r.e2e for r in records) > SETUP.node_timeout_s > max(r.e2e for r in well)


def test_a_mixed_node_dies_and_no_request_is_lost() -> None:
    setup = replace(SETUP, split=Split(mixed=2), failures=(Failure("mixed-0", 1.0),))
    records = simulate(setup, steady(60, 30.0)).records
    assert len(records) == 60
    assert all(record.error is None for record in records)


def test_a_single_token_needs_no_second_node() -> None:
    setup = replace(SETUP, split=Split(mixed=2))
    assert only(simulate(setup, trace((0.0, 100, 1))).records).tpot is None


def test_short_prompts_go_around_a_long_one_and_long_ones_leave_streams_alone() -> None:
    """Long prompts among chats: what neither of the two kinds of fleet can do without a choice."""
    chats = tuple((0.02 + 0.1 * i, 40, 30) for i in range(40))
    load = trace(*sorted([*chats, *((0.5 * i, 3000, 4) for i in range(8))]))
    slow = replace(SETUP, model=replace(MODEL, prefill=(0.010, 1e-4, 0.0)))
    found = {}
    for name, split, rules in (
        ("apart", Split(prefill=1, decode=1), ALWAYS),
        ("chosen", Split(prefill=1, decode=1), Rules()),
        ("together", Split(mixed=2), Rules()),
    ):
        records = simulate(replace(slow, split=split, rules=rules), load).records
        assert all(record.error is None for record in records)
        short = [record for record in records if record.prompt_tokens == 40]
        found[name] = (
            sum((record.ttft or 0.0) < 0.1 for record in short) / len(short),
            sum((record.tpot or 0.0) < 0.016 for record in short) / len(short),
        )
    assert found["apart"][0] < 0.8, "they wait behind the long one"
    assert found["together"][1] < 0.8, "their tokens wait for it"
    assert min(found["chosen"]) > 0.9


def test_more_nodes_of_the_kind_that_lacks_help() -> None:
    prompts = steady(150, 12.0, input_len=1000, output_len=2)
    one, two = (simulate(replace(SETUP, split=Split(prefill=n, decode=1)), prompts) for n in (1, 2))
    assert max(one.busy, key=lambda node: one.busy[node]) == "prefill-0"
    assert sum(r.ttft or 0 for r in two.records) < 0.5 * sum(r.ttft or 0 for r in one.records)


@pytest.mark.parametrize("wrong", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1)])
def test_splits_that_are_none(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="is no fleet"):
        Split(*wrong)
