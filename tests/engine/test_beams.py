"""Beam searches among other requests: they find what a search alone finds, and no block is lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.beam_search import BeamSearch, num_continuations
from engine.engine import Engine
from engine.logprobs import pack_rows
from engine.plan import RequestProgress
from engine.request import Request
from engine.stops import end_tokens
from tests.engine.drafters import Oracle, always
from tests.engine.hash_runner import (
    VOCAB_SIZE,
    HashRunner,
    chain,
    expected_output,
    logits_after,
)
from tests.engine.test_engine_core import BLOCK_SIZE, EOS, MAX_MODEL_LEN, make_engine
from wire.errors import CapacityError
from wire.types import BeamParams, EarlyStopping, Hypothesis, SamplingParams


def beam_request(
    name: str, tokens: list[int], width: int = 3, max_tokens: int = 12, **fields: Any
) -> Request:
    params = BeamParams(width, fields.pop("length_penalty", 1.0), fields.pop("early", _NEVER))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, beam=params, **fields)
    return Request(name, list(tokens), len(tokens), sampling, MAX_MODEL_LEN)


_NEVER = EarlyStopping.NEVER


def plain_request(name: str, tokens: list[int], max_tokens: int = 12) -> Request:
    sampling = SamplingParams(seed=len(tokens), max_tokens=max_tokens)
    return Request(name, list(tokens), len(tokens), sampling, MAX_MODEL_LEN)


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(1, VOCAB_SIZE) for _ in range(length)]


def alone(request: Request) -> list[Hypothesis]:
    """What its search finds by itself."""
    sampling, ends = request.sampling, end_tokens(request.sampling, EOS)
    assert sampling.beam is not None
    search = BeamSearch(
        sampling.beam,
        max_tokens=request.token_limit - request.num_prompt_tokens,
        min_tokens=sampling.min_tokens,
        end_tokens=ends,
    )
    while not search.over:
        rows = []
        for beam in search.running:
            state = chain([*request.tokens[: request.num_prompt_tokens], *beam.tokens])[-1]
            logprobs = logits_after(state).log_softmax(-1)
            rows.append(list(enumerate(logprobs.tolist())))
        search.advance(rows)
    return search.finished


def check_found(request: Request, found: tuple[Hypothesis, ...]) -> None:
    expected = alone(request)
    assert [h.tokens for h in found] == [h.tokens for h in expected]
    assert [h.finish for h in found] == [h.finish for h in expected]
    assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)


def steps(engine: Engine, limit: int = 500) -> dict[str, list[RequestProgress]]:
    """Run until nothing is left; the books are checked after every step."""
    seen: dict[str, list[RequestProgress]] = {}
    for _ in range(limit):
        if not engine.has_work():
            break
        result = engine.step()
        engine.check_integrity()
        for progress in result.progress if result else ():
            seen.setdefault(progress.request_id, []).append(progress)
    assert not engine.has_work()
    return seen


def check_all_free(engine: Engine) -> None:
    counts = engine.block_counts()
    assert counts.free + counts.cached == counts.total


@pytest.mark.parametrize("length", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE * 3 + 1])
@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_search_finds_what_it_finds_alone(length: int, width: int) -> None:
    for seed, early in enumerate(EarlyStopping):
        engine, _ = make_engine()
        request = beam_request("a", prompt(seed, length), width, early=early, length_penalty=0.8)
        engine.add(request)
        progress = steps(engine)["a"]
        assert all(not p.hypotheses and not p.new_tokens for p in progress[:-1])
        check_found(request, progress[-1].hypotheses)
        check_all_free(engine)


def test_searches_share_steps_with_requests_and_chunks() -> None:
    for seed in range(6):
        engine, _ = make_engine(num_blocks=96, max_num_seqs=6)
        requests = [
            beam_request("a", prompt(seed, 9), 3, ignore_eos=True),
            plain_request("b", prompt(seed + 50, 7)),
            beam_request("c", prompt(seed, 9)[:6] + prompt(seed + 60, 25), 4, min_tokens=4),
            plain_request("d", prompt(seed + 70, 21)),
        ]
        for request in requests:
            engine.add(request)
        seen = steps(engine)
        for request in requests:
            if request.sampling.beam is not None:
                check_found(request, seen[request.request_id][-1].hypotheses)
            else:
                tokens = [t for p in seen[request.request_id] for t in p.new_tokens]
                assert (
                    tokens
                    == expected_output(
                        plain_request("x", request.tokens[: request.num_prompt_tokens]), EOS
                    )[0]
                )
        check_all_free(engine)


def test_drafts_for_others_leave_a_search_alone() -> None:
    """Its prompt comes to be one token behind too, and is not drafted either."""
    sampling = SamplingParams(seed=1, max_tokens=24, ignore_eos=True)
    plain = Request("a", prompt(1, 7), 7, sampling, MAX_MODEL_LEN)
    whole = [*plain.tokens, *expected_output(plain, EOS)[0]]
    oracle = Oracle(lambda request: whole, 0.7, vocab_size=VOCAB_SIZE)
    engine, _ = make_engine(num_blocks=64, speculation=always(oracle, 4, VOCAB_SIZE))
    search = beam_request("b", prompt(2, 17), 3, ignore_eos=True)
    engine.add(plain)
    engine.add(search)
    seen = steps(engine)
    assert plain.tokens == whole
    check_found(search, seen["b"][-1].hypotheses)
    assert oracle.num_accepted > 0


def test_only_the_blocks_that_differ_are_the_beams_own() -> None:
    engine, _ = make_engine(num_blocks=64)
    tokens = prompt(3, 6 * BLOCK_SIZE + 2)
    engine.add(beam_request("a", tokens, 4, max_tokens=2 * BLOCK_SIZE, ignore_eos=True))
    most = 0
    while engine.has_work():
        engine.step()
        most = max(most, engine.block_counts().running)
    assert 6 + 4 <= most <= 6 + 4 * 3


def test_a_preempted_search_begins_again_and_finds_the_same() -> None:
    preempted = 0
    for seed in range(12):
        engine, _ = make_engine(num_blocks=14, kv_overcommit=4.0, max_num_seqs=8)
        requests = [
            plain_request("a", prompt(seed, 8), max_tokens=30),
            beam_request("b", prompt(seed + 1, 5), 3, max_tokens=14, ignore_eos=True),
            beam_request("c", prompt(seed + 2, 6), 2, max_tokens=14, ignore_eos=True),
        ]
        for request in requests:
            engine.add(request)
        seen = steps(engine)
        for request in requests[1:]:
            check_found(request, seen[request.request_id][-1].hypotheses)
            preempted += request.num_preemptions
        check_all_free(engine)
    assert preempted > 3


@pytest.mark.parametrize("when", range(0, 12, 2))
def test_an_abort_frees_all_beams_within_a_step(when: int) -> None:
    engine, runner = make_engine()
    engine.add(beam_request("a", prompt(when, 9), 4, ignore_eos=True))
    for _ in range(when):
        engine.step()
    runner.during_run = lambda: engine.abort("a")
    engine.step()
    engine.check_integrity()
    assert not engine.has_work()
    check_all_free(engine)


def test_a_step_that_fails_can_be_tried_again() -> None:
    """Copies are made again, and nothing is entered twice."""
    engine, runner = make_engine()
    request = beam_request("a", prompt(4, 9), 4, ignore_eos=True)
    engine.add(request)

    def fail() -> None:
        raise RuntimeError("broken")

    results: list[RequestProgress] = []
    while engine.has_work():
        runner.during_run = fail
        with pytest.raises(RuntimeError):
            engine.step()
        assert engine.step_request_ids == ("a",)
        engine.check_integrity()
        runner.during_run = lambda: None
        result = engine.step()
        assert result is not None
        results += result.progress
    check_found(request, results[-1].hypotheses)


class Broken(HashRunner):
    """One row is no number from some step on."""

    num_steps = 0

    def run(self, plan: Any, *args: Any) -> Tensor:
        logits = super().run(plan, *args)
        self.num_steps += 1
        if self.num_steps > 4:
            logits[-1] = torch.nan
        return logits


def test_a_broken_beam_ends_its_search_alone() -> None:
    engine, _ = make_engine()
    broken = Broken(32, BLOCK_SIZE)
    engine._runner = broken
    engine.add(plain_request("a", prompt(1, 3), max_tokens=9))
    engine.add(beam_request("b", prompt(2, 3), 3, ignore_eos=True))
    named: list[str] = []
    for _ in range(30):
        result = engine.step()
        named += result.corrupted if result is not None else ()
        engine.check_integrity()
        if "b" in named:
            broken.num_steps = -100
    assert named == ["b"]
    assert not engine.has_work()
    check_all_free(engine)


def first_row(request: Request) -> bytes:
    assert request.sampling.beam is not None
    number = num_continuations(request.sampling.beam, end_tokens(request.sampling, EOS))
    logits = logits_after(chain(request.tokens)[-1]).unsqueeze(0)
    return pack_rows(logits, [int(logits.argmax())], number)[0]


@pytest.mark.parametrize("length", [BLOCK_SIZE - 1, BLOCK_SIZE * 2, BLOCK_SIZE * 2 + 3])
def test_a_search_goes_on_from_received_blocks(length: int) -> None:
    engine, runner = make_engine()
    request = beam_request("a", prompt(9, length), 3, ignore_eos=True)
    reservation = engine.reserve(request.tokens, length + 12, width=3)
    runner.write([h.block_id for h in reservation.handles], chain(request.tokens), 0)
    engine.adopt(reservation.id, request, first_row(request))
    engine.check_integrity()
    check_found(request, steps(engine)["a"][-1].hypotheses)
    check_all_free(engine)


def test_what_all_beams_may_need_is_promised() -> None:
    engine, _ = make_engine(num_blocks=14)
    tokens = prompt(1, 2 * BLOCK_SIZE)
    most = 2 + 4 * 3  # two shared blocks, and three for each beam
    with pytest.raises(CapacityError):
        engine.reserve(tokens, 5 * BLOCK_SIZE + 2, width=4)
    reservation = engine.reserve(tokens, 5 * BLOCK_SIZE + 1, width=4)
    assert engine.load().blocks_promised == most - 2
    with pytest.raises(CapacityError):
        engine.reserve(prompt(2, 3), 3)
    engine.cancel_reservation(reservation.id)
    with pytest.raises(ValueError, match="seats"):
        engine.add(beam_request("wide", tokens, 7))


def test_a_prefill_node_passes_the_search_on_or_ends_it() -> None:
    engine, _ = make_engine()
    goes_on = beam_request("a", prompt(5, 9), 3)
    ends = beam_request("b", prompt(6, 9), 3, max_tokens=1)
    for request in (goes_on, ends):
        request.prefill_only = True
        engine.add(request)
    seen = steps(engine)
    last = seen["a"][-1]
    assert (last.finish_reason, last.hypotheses) == (None, ())
    assert last.logprobs is not None
    plain = beam_request("a", goes_on.tokens[:9], 3)
    assert last.logprobs.tokens == (first_row(plain),)
    check_found(beam_request("b", ends.tokens[:9], 3, max_tokens=1), seen["b"][-1].hypotheses)
    for name in ("a", "b"):
        engine.release_held(name)
    check_all_free(engine)


@pytest.mark.parametrize("seed", range(6))
def test_random_walk(seed: int) -> None:
    """Searches and requests come, are aborted, adopted and preempted, and steps fail, at random."""
    chance = random.Random(seed)
    engine, runner = make_engine(num_blocks=40, kv_overcommit=3.0, max_num_seqs=8)
    requests: dict[str, Request] = {}
    found: dict[str, tuple[Hypothesis, ...]] = {}
    reserved: list[tuple[int, Request]] = []

    def act() -> None:
        name, tokens = f"r{len(requests)}", prompt(chance.randrange(9), chance.randint(1, 14))
        match chance.randrange(6):
            case 0:
                requests[name] = plain_request(name, tokens)
                engine.add(requests[name])
            case 1 | 2:
                requests[name] = beam_request(name, tokens, chance.randint(1, 5))
                engine.add(requests[name])
            case 3 if requests:
                engine.abort(chance.choice(list(requests)))
            case 4:
                reserve(beam_request(name, tokens, chance.randint(2, 4), ignore_eos=True))
            case 5 if reserved:
                reservation, request = reserved.pop()
                if chance.random() < 0.3:
                    engine.cancel_reservation(reservation)
                else:
                    engine.adopt(reservation, request, first_row(request))
                    requests[request.request_id] = request

    def reserve(request: Request) -> None:
        most = request.num_prompt_tokens + request.sampling.max_tokens
        try:
            reservation = engine.reserve(request.tokens, most, width=request.width)
        except CapacityError:
            return
        cached = reservation.num_cached_tokens
        runner.write([h.block_id for h in reservation.handles], chain(request.tokens), cached)
        request.request_id = f"s{reservation.id}"
        reserved.append((reservation.id, request))

    def during_run() -> None:
        if chance.random() < 0.3:
            act()
        if chance.random() < 0.1:
            raise RuntimeError("broken")

    runner.during_run = during_run
    for number in range(400):
        if number < 60:
            act()
        elif reserved:
            engine.cancel_reservation(reserved.pop()[0])
        try:
            result = engine.step()
        except RuntimeError:
            result = None
        engine.check_integrity()
        for progress in result.progress if result is not None else ():
            if progress.hypotheses:
                found[progress.request_id] = progress.hypotheses
        if number > 60:
            runner.during_run = lambda: None
            if not engine.has_work() and not reserved:
                break
    check_all_free(engine)
    assert len(found) > 2
    for name, hypotheses in found.items():
        check_found(requests[name], hypotheses)
