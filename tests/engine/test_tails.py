"""A prompt that was computed here before costs one token: its last block is copied, not shared.

The hash runner notices each slot that does not hold what it must.
"""

from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.request import Request
from tests.engine.hash_runner import HashRunner, expected_output
from tests.engine.test_engine_core import BLOCK_SIZE, EOS, make_engine, make_request, run_all

PROMPT = [(5 * i) % 23 for i in range(22)]  # five full blocks and a half


def prefill(engine: Engine, name: str, tokens: list[int]) -> tuple[int, Request]:
    """How many tokens were computed for it."""
    request = make_request(name, tokens, prefill_only=True, seed=len(name))
    expected = expected_output(request, EOS)[0][:1]
    engine.add(request)
    results = run_all(engine)
    assert request.output_tokens == expected
    return sum(result.num_tokens for result in results), request


@pytest.mark.parametrize("length", [1, 2, BLOCK_SIZE, 17, 18, 19, 20, 22])
def test_the_same_prompt_once_more_costs_one_token(length: int) -> None:
    engine, _ = make_engine()
    prompt = PROMPT[:length]
    assert prefill(engine, "a", prompt)[0] == length
    for name in ("b", "cc", "ddd"):
        computed, request = prefill(engine, name, prompt)
        assert computed == 1
        assert request.num_cached_tokens == length - 1
        assert engine.release_held(name)
    assert engine.release_held("a")
    assert engine.block_counts().leased == engine.block_counts().running == 0


def test_blocks_that_are_held_are_each_requests_own() -> None:
    engine, runner = make_engine()
    _, first = prefill(engine, "a", PROMPT)
    before = [runner.read(first.block_table[-1], position) for position in range(20, 22)]
    _, second = prefill(engine, "b", PROMPT)
    assert first.block_table[:-1] == second.block_table[:-1]
    assert first.block_table[-1] != second.block_table[-1]
    assert before == [runner.read(first.block_table[-1], position) for position in range(20, 22)]


def test_a_longer_a_shorter_or_another_prompt_has_another_tail() -> None:
    engine, _ = make_engine(num_blocks=60)
    prefill(engine, "a", PROMPT)
    for name, tokens in {"b": [*PROMPT, 3], "cc": PROMPT[:21], "ddd": [*PROMPT[:21], 9]}.items():
        assert prefill(engine, name, tokens)[0] == len(tokens) - 20


def test_nobody_else_is_told_of_tails() -> None:
    engine, _ = make_engine()
    prefill(engine, "a", PROMPT)
    assert len(engine.take_cache_events().added) == len(engine.cached_hashes()) == 5
    engine.release_held("a")
    for number in range(8):  # until the tail is evicted
        prefill(engine, f"other{number}", [number] * 18)
        engine.release_held(f"other{number}")
    assert len(engine.take_cache_events().removed) < 8 * 5
    assert prefill(engine, "b", PROMPT)[0] > 1


def test_without_room_for_the_copy_or_without_caching_there_is_none() -> None:
    engine, _ = make_engine(num_blocks=6)
    prefill(engine, "a", PROMPT)
    engine.release_held("a")
    assert prefill(engine, "b", PROMPT)[0] == 2
    engine.release_held("b")
    engine, _ = make_engine(enable_prefix_caching=False)
    prefill(engine, "a", PROMPT)
    assert prefill(engine, "b", PROMPT)[0] == len(PROMPT)


def broken_step(engine: Engine, runner: HashRunner) -> None:
    def fail() -> None:
        raise RuntimeError("on purpose")

    runner.during_run = fail
    with pytest.raises(RuntimeError):
        engine.step()
    runner.during_run = lambda: None
    engine.check_integrity()


@pytest.mark.parametrize("ends", ["goes on", "is aborted"])
def test_a_failed_step_copies_again_or_lets_the_tail_go(ends: str) -> None:
    engine, runner = make_engine()
    prefill(engine, "a", PROMPT)
    engine.release_held("a")
    request = make_request("b", PROMPT, prefill_only=True)
    engine.add(request)
    broken_step(engine, runner)
    assert request.copied_block is not None
    if ends == "goes on":
        runner.write([request.block_table[-1]] * 6, [-1] * 22, 20)  # as if it had come to nothing
        run_all(engine)
        assert request.output_tokens == expected_output(request, EOS)[0][:1]
        engine.release_held("b")
    else:
        assert engine.abort("b")
    engine.check_integrity()
    counts = engine.block_counts()
    assert counts.free + counts.cached == counts.total


def test_broken_logits_make_the_tail_unfindable() -> None:
    engine, _ = make_engine()
    _, first = prefill(engine, "a", PROMPT)
    tail = first.block_table[-1]
    engine.release_held("a")
    request = make_request("b", PROMPT, prefill_only=True)
    engine.add(request)
    scheduler = engine._scheduler
    plan = scheduler.plan()
    assert plan.copied_blocks == [(tail, request.block_table[-1])]
    scheduler.commit(plan, [0], corrupted=["b"])
    engine.check_integrity()
    assert prefill(engine, "cc", PROMPT)[0] == len(PROMPT)


def test_a_request_that_decodes_on_a_copy_while_steps_are_looked_beyond() -> None:
    engine, _ = make_engine(lookahead=True)
    prefill(engine, "a", PROMPT)
    request = make_request("b", PROMPT, seed=4, max_tokens=9, ignore_eos=True)
    expected = expected_output(request, EOS)[0]
    engine.add(request)
    run_all(engine)
    assert request.num_cached_tokens == 21
    assert request.output_tokens == expected
