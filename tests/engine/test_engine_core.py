"""The engine produces what each request would get alone, whatever else happens around it.

A random walk adds requests of all kinds, aborts them before, between and in the middle of steps,
reserves, transfers, adopts, cancels, and lets steps fail. The runner notices every wrong slot that
it reads; the books are checked after every step, and at the end every block is free or cached.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.plan import RequestProgress, StepPlan, StepResult
from engine.request import Request
from engine.reservations import Reservation
from tests.engine.drafters import Oracle, always
from tests.engine.expected_logprobs import check_prompt_rows, check_row
from tests.engine.hash_runner import (
    VOCAB_SIZE,
    HashRunner,
    chain,
    expected_output,
    logits_after,
)
from wire.errors import CapacityError
from wire.logprobs import Logprobs
from wire.types import BlockHandle, FinishReason, SamplingParams

EOS = frozenset([1])
BLOCK_SIZE = 4
MAX_MODEL_LEN = 40


class RunnerBroke(Exception):
    """The runner failed on purpose."""


def make_engine(
    *,
    num_blocks: int = 32,
    kv_overcommit: float = 1.0,
    enable_prefix_caching: bool = True,
    max_num_seqs: int = 6,
    max_num_batched_tokens: int = 16,
    speculation: Speculation | None = None,
    lookahead: bool = False,
) -> tuple[Engine, HashRunner]:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_overcommit=kv_overcommit,
        enable_prefix_caching=enable_prefix_caching,
        lookahead=lookahead,
    )
    runner = HashRunner(num_blocks, BLOCK_SIZE)
    engine = Engine(
        config,
        runner,
        epoch=5,
        model_fingerprint="m",
        eos_token_ids=EOS,
        speculation=speculation,
    )
    return engine, runner


def make_request(
    name: str, tokens: list[int], prefill_only: bool = False, **sampling: Any
) -> Request:
    return Request(
        request_id=name,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(**sampling),
        max_num_tokens=MAX_MODEL_LEN,
        prefill_only=prefill_only,
    )


def run_all(engine: Engine) -> list[StepResult]:
    results = []
    while engine.has_work():
        result = engine.step()
        assert result is not None
        engine.check_integrity()
        results.append(result)
    return results


# ------------------------------------------------------------ the walk


@dataclass
class Expected:
    """What a request must produce, and what it has produced."""

    request: Request
    output: list[int]
    reason: FinishReason | None
    first: int  # output tokens that it came with
    got: list[int] = field(default_factory=list)
    ended: bool = False
    blocks: dict[int, BlockHandle] = field(default_factory=dict)


@dataclass
class Leased:
    """A reservation whose blocks are being received."""

    reservation: Reservation
    tokens: list[int]
    receiving: list[BlockHandle] = field(default_factory=list)


class Walk:
    """One engine under random use."""

    def __init__(self, seed: int, *, drafts: bool = False, lookahead: bool = False) -> None:
        self.lookahead = lookahead
        self.rng = rng = random.Random(seed)
        self.overcommit = rng.choice([1.0, 1.0, 3.0])
        self.engine, self.runner = make_engine(
            num_blocks=rng.choice([12, 30]),
            kv_overcommit=self.overcommit,
            enable_prefix_caching=rng.random() < 0.8,
            max_num_seqs=rng.choice([2, 6]),
            max_num_batched_tokens=rng.choice([3, 8, 24]),
            speculation=self.speculation() if drafts else None,
            lookahead=lookahead,
        )
        self.runner.during_run = self.in_the_step
        self.alive: dict[str, Expected] = {}
        self.aborted: set[str] = set()
        self.held: dict[str, Expected] = {}
        self.leases: list[Leased] = []
        self.io: list[BlockHandle] = []
        self.known_hashes: set[bytes] = set()
        self.num_added = self.num_finished = self.num_preempted = self.num_prompts_told = 0
        self.num_rebound = self.num_ahead = 0

    def speculation(self) -> Speculation:
        """Drafts that are right in part, never, or always, of any length."""
        share = self.rng.choice([0.0, 0.5, 0.8, 1.0])
        self.drafter = Oracle(self.tokens_of, share, vocab_size=VOCAB_SIZE)
        return always(self.drafter, self.rng.choice([1, 3, 9]), VOCAB_SIZE)

    def tokens_of(self, request: Request) -> list[int]:
        output = self.alive[request.request_id].output if request.request_id in self.alive else []
        return [*request.tokens[: request.num_prompt_tokens], *output]

    # -------------------------------------------------------- what can happen

    def random_tokens(self) -> list[int]:
        """Prompts of few kinds, so that prefixes are shared at every length."""
        kind = self.rng.randrange(3)
        length = self.rng.randrange(1, 24)
        tokens = [(kind * 7 + i * i) % VOCAB_SIZE for i in range(length)]
        if self.rng.random() < 0.4:
            tokens[-1] = self.rng.randrange(VOCAB_SIZE)
        return tokens

    def random_request(self, tokens: list[int], prefill_only: bool = False) -> Request:
        rng = self.rng
        self.num_added += 1
        plain = self.lookahead and rng.random() < 0.9  # no step is looked beyond with one that asks
        request = make_request(
            f"r{self.num_added}",
            tokens,
            prefill_only,
            max_tokens=rng.choice([2, 5, 12, 100]),
            temperature=rng.choice([0.0, 0.8]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=0.0 if plain else rng.choice([0.0, 0.3]),
            seed=rng.getrandbits(64),
            ignore_eos=rng.random() < 0.5,
            logprobs=None if plain else rng.choice([None, None, 0, 3, 100]),
            prompt_logprobs=None if plain else rng.choice([None, 0, 2]),
        )
        request.cache_salt = rng.choice(["", "", "tenant"])
        return request

    def expect(self, request: Request) -> None:
        output, reason = expected_output(request, EOS)
        self.alive[request.request_id] = Expected(
            request, output, reason, request.num_output_tokens
        )

    def add(self) -> None:
        request = self.random_request(self.random_tokens(), self.rng.random() < 0.3)
        try:
            self.engine.add(request, only_with_room=not request.prefill_only)
        except CapacityError:
            return
        self.expect(request)

    def abort(self) -> None:
        name = self.rng.choice([*self.alive, *self.held, "nobody"])
        known = name in self.alive or name in self.held
        assert self.engine.abort(name) is known
        if known:
            self.aborted.add(name)
            self.alive.pop(name, None)
            self.held.pop(name, None)

    def reserve(self) -> None:
        tokens = self.random_tokens()
        counts = self.engine.block_counts()
        try:
            reservation = self.engine.reserve(tokens, MAX_MODEL_LEN)
        except CapacityError:
            assert self.engine.block_counts() == counts, "a refusal took something"
            return
        self.leases.append(Leased(reservation, tokens))

    def receive(self) -> None:
        """The blocks that a lease lacks begin to arrive."""
        if not self.leases:
            return
        lease = self.rng.choice(self.leases)
        if not lease.receiving:
            missing = lease.reservation.num_cached_tokens // BLOCK_SIZE
            for handle in lease.reservation.handles[missing:]:
                assert self.engine.begin_io(handle)
                lease.receiving.append(handle)

    def adopt(self) -> None:
        if not self.leases:
            return
        lease = self.leases.pop(self.rng.randrange(len(self.leases)))
        blocks = [handle.block_id for handle in lease.reservation.handles]
        self.runner.write(blocks, chain(lease.tokens), lease.reservation.num_cached_tokens)
        for handle in lease.receiving:
            self.engine.end_io(handle)
        request = self.random_request(lease.tokens)
        [first] = expected_output(request, EOS)[0][:1]
        request.tokens.append(first)
        request.cache_salt = ""
        self.engine.adopt(lease.reservation.id, request)
        self.expect(request)

    def cancel(self) -> None:
        """A lease ends while writes are outstanding; they land late, as garbage."""
        if not self.leases:
            return
        lease = self.leases.pop(self.rng.randrange(len(self.leases)))
        assert self.engine.cancel_reservation(lease.reservation.id)
        for handle in lease.receiving:
            assert not self.engine.begin_io(handle)
        self.io += lease.receiving

    def rebind(self) -> None:
        """Somebody else fills a lease; what was under way lands late, in blocks of nobody."""
        if not self.leases:
            return
        lease = self.rng.choice(self.leases)
        tokens = [*lease.tokens, *[self.rng.randrange(VOCAB_SIZE)] * self.rng.choice([0, 1])]
        counts = self.engine.block_counts()
        try:
            reservation = self.engine.rebind(lease.reservation.id, tokens)
        except CapacityError:
            assert self.engine.block_counts() == counts, "a refusal took something"
            return
        self.num_rebound += 1
        reused = {handle.block_id for handle in reservation.handles}
        assert not reused & {handle.block_id for handle in lease.receiving}
        kept = min(lease.reservation.num_cached_tokens, reservation.num_cached_tokens) // BLOCK_SIZE
        assert reservation.handles[:kept] == lease.reservation.handles[:kept]
        assert not set(reservation.handles) & set(lease.reservation.handles[kept:])
        assert not self.engine.cancel_reservation(lease.reservation.id)
        self.io += lease.receiving
        self.leases.remove(lease)
        self.leases.append(Leased(reservation, tokens))

    def end_io(self) -> None:
        if self.io:
            handle = self.io.pop(self.rng.randrange(len(self.io)))
            if not self.engine.is_current(handle):  # nobody may look at it: scribble
                self.runner.write([handle.block_id], [-2] * BLOCK_SIZE, 0)
            self.engine.end_io(handle)

    def send(self) -> None:
        """A held request's blocks are read by a transfer and hold what they should."""
        if not self.held:
            return
        expected = self.rng.choice(list(self.held.values()))
        states = chain(expected.request.tokens[:-1])
        assert len(expected.blocks) == -(-len(states) // BLOCK_SIZE)
        for position, state in enumerate(states):
            block_id = expected.blocks[position // BLOCK_SIZE].block_id
            assert self.runner.read(block_id, position) == state
        for handle in expected.blocks.values():
            assert self.engine.begin_io(handle)
            self.io.append(handle)

    def release(self) -> None:
        if self.held:
            name = self.rng.choice(list(self.held))
            del self.held[name]
            assert self.engine.release_held(name)

    def in_the_step(self) -> None:
        """Other threads' calls arrive while the model runs, and the model may break."""
        if self.rng.random() < 0.4:
            self.anything()()
        if self.rng.random() < 0.03:
            raise RunnerBroke

    def anything(self) -> Callable[[], None]:
        choices = {
            self.add: 6,
            self.abort: 1,
            self.reserve: 2,
            self.receive: 2,
            self.adopt: 2,
            self.cancel: 1,
            self.rebind: 2,
            self.end_io: 3,
            self.send: 2,
            self.release: 2,
        }
        return self.rng.choices(list(choices), list(choices.values()))[0]

    # -------------------------------------------------------- stepping and checking

    def step(self) -> None:
        try:
            result = self.engine.step()
        except RunnerBroke:
            result = None
        self.engine.check_integrity()
        self.num_ahead += self.engine._ahead is not None
        if result is not None:
            assert result.num_tokens <= self.engine.config.max_num_batched_tokens
            self.num_preempted += result.num_preempted
            for progress in result.progress:
                self.check_progress(progress)
        load = self.engine.load()
        if self.overcommit == 1.0:
            assert load.blocks_promised <= load.blocks_free
            assert self.num_preempted == 0

    def check_progress(self, progress: RequestProgress) -> None:
        name = progress.request_id
        assert name not in self.aborted, "an aborted request was mentioned"
        expected = self.alive[name]
        assert progress.index == expected.first + len(expected.got), "a gap in the tokens"
        self.check_logprobs(expected.request, progress)
        expected.got += progress.new_tokens
        done = expected.first + len(expected.got)
        assert expected.output[expected.first : done] == expected.got
        expected.blocks.update(progress.finished_blocks)
        if expected.request.prefill_only and progress.new_tokens:
            is_last = len(expected.output) == 1
            assert progress.finish_reason is (expected.reason if is_last else None)
            self.held[name] = self.alive.pop(name)
            self.num_finished += 1
        elif progress.finish_reason is not None:
            assert progress.finish_reason is expected.reason
            assert done == len(expected.output)
            del self.alive[name]
            self.num_finished += 1

    def check_logprobs(self, request: Request, progress: RequestProgress) -> None:
        """With each token, and those of the whole prompt with the first one of all."""
        sampling = request.sampling
        if not progress.new_tokens:
            assert progress.logprobs is None
            return
        told = progress.logprobs or Logprobs()
        first = request.num_prompt_tokens + progress.index
        after = [logits_after(state) for state in chain(request.tokens[:-1])]
        wanted = len(progress.new_tokens) * (sampling.logprobs is not None)
        assert len(told.tokens) == wanted
        for number, row in enumerate(told.tokens, start=first):
            check_row(row, after[number - 1], request.tokens[number], sampling.logprobs or 0)
        tokens = request.tokens[: first + 1]
        if sampling.prompt_logprobs is not None and progress.index == 0:
            check_prompt_rows(told.prompt, after, tokens[:-1], sampling.prompt_logprobs)
            self.num_prompts_told += 1
        else:
            assert not told.prompt

    def follow_events(self) -> None:
        changes = self.engine.take_cache_events()
        self.known_hashes = (self.known_hashes | set(changes.added)) - set(changes.removed)
        assert self.known_hashes == set(self.engine.cached_hashes())

    def run(self, num_events: int) -> None:
        for _ in range(num_events):
            if self.rng.random() < 0.5:
                self.step()
            else:
                self.anything()()
                self.engine.check_integrity()
            self.follow_events()

    def wind_down(self) -> None:
        """Nothing new comes; what is there ends, and every block comes back."""
        self.runner.during_run = lambda: None
        while self.leases:
            self.cancel()
        while self.held:
            self.release()
        while self.io:
            self.end_io()
        budget = 5000
        while self.engine.has_work():
            self.step()
            while self.held:
                self.release()
            budget -= 1
            assert budget, "no progress"
        assert not self.alive
        counts = self.engine.block_counts()
        assert counts.free + counts.cached == counts.total
        assert self.engine.load().blocks_promised == 0


@pytest.mark.parametrize("kind", ["plain", "drafts", "lookahead"])
@pytest.mark.parametrize("seed", range(40))
def test_random_walk(seed: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    walk = Walk(seed, drafts=kind == "drafts", lookahead=kind == "lookahead")
    walk.run(120)
    walk.wind_down()
    assert all("RunnerBroke" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["plain", "drafts", "lookahead"])
def test_the_walk_reaches_what_it_is_for(kind: str) -> None:
    """Preemption, prefix hits, finished requests: a walk that avoids them proves nothing."""
    drafts, lookahead = kind == "drafts", kind == "lookahead"
    walks = [Walk(seed, lookahead=lookahead) for seed in range(12)]
    for walk in walks:
        walk.overcommit = 3.0
        speculation = walk.speculation() if drafts else None
        walk.engine, walk.runner = make_engine(
            num_blocks=12, kv_overcommit=3.0, speculation=speculation, lookahead=lookahead
        )
        walk.runner.during_run = walk.in_the_step
        walk.run(150)
        walk.wind_down()
    assert sum(walk.num_preempted for walk in walks) > 10
    assert sum(walk.num_finished for walk in walks) > 100
    assert sum(walk.num_prompts_told for walk in walks) > (3 if lookahead else 10)
    assert sum(len(walk.aborted) for walk in walks) > 10
    assert sum(walk.num_rebound for walk in walks) > 10
    assert sum(walk.num_ahead for walk in walks) > (200 if lookahead else -1)
    if drafts:
        assert sum(walk.drafter.num_accepted for walk in walks) > 100


# ------------------------------------------------------------ single facts


def test_chunks_neighbours_and_prefixes_do_not_change_the_output() -> None:
    tokens = [(i * 5) % VOCAB_SIZE for i in range(21)]
    outputs = []
    for budget in (1, 3, 16, 64):
        engine, _ = make_engine(max_num_batched_tokens=budget)
        requests = [make_request(f"r{i}", tokens, max_tokens=9, seed=3) for i in range(4)]
        for request in requests:
            engine.add(request)
        run_all(engine)
        outputs += [request.output_tokens for request in requests]
    expected, _ = expected_output(make_request("alone", tokens, max_tokens=9, seed=3), EOS)
    assert all(output == expected for output in outputs)


def test_output_of_a_handoff_equals_output_in_place() -> None:
    tokens = [(i * 3) % VOCAB_SIZE for i in range(18)]
    sampling: dict[str, Any] = {"max_tokens": 12, "seed": 9, "ignore_eos": True}
    prefill, source = make_engine()
    decode, target = make_engine()

    prefill.add(make_request("p", tokens, prefill_only=True, **sampling))
    [*_, last] = run_all(prefill)
    reservation = decode.reserve(tokens, 30)
    handed = make_request("d", tokens, **sampling)
    handles = last.progress[0].finished_blocks
    states = chain(tokens)
    for index, handle in handles:
        assert prefill.begin_io(handle)
        for position in range(index * BLOCK_SIZE, min(len(tokens), (index + 1) * BLOCK_SIZE)):
            assert source.read(handle.block_id, position) == states[position]
        prefill.end_io(handle)
    target.write([h.block_id for h in reservation.handles], states, 0)
    handed.tokens += last.progress[0].new_tokens
    decode.adopt(reservation.id, handed)
    assert prefill.release_held("p")
    results = run_all(decode)

    assert results[0].progress[0].index == 1
    assert handed.output_tokens == expected_output(make_request("x", tokens, **sampling), EOS)[0]


def test_a_failed_step_names_its_requests_and_can_be_repeated() -> None:
    engine, runner = make_engine()
    engine.add(make_request("a", [2, 3, 4], max_tokens=3))

    def fail() -> None:
        raise RunnerBroke

    runner.during_run = fail
    with pytest.raises(RunnerBroke):
        engine.step()
    assert engine.step_request_ids == ("a",)
    engine.check_integrity()
    assert engine.has_work()
    runner.during_run = lambda: None
    [first, *_] = run_all(engine)
    assert first.progress[0].index == 0


class Broken:
    """Turns logits of the requests in `names` into NaN: of sampled rows, or of all."""

    def __init__(self, runner: HashRunner, *names: str, first_row_only: bool = False) -> None:
        self._runner, self._names, self._first_row_only = runner, names, first_row_only

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        logits, row = self._runner.run(plan, on_layers, on_hidden, sampled), 0
        for item in plan.scheduled:
            rows = logits[row : row + item.num_logits]
            if item.request.request_id in self._names and len(rows):
                (rows[:1] if self._first_row_only else rows)[:] = torch.nan
            row += item.num_logits
        return logits


def test_broken_logits_end_their_request_alone() -> None:
    engine, runner = make_engine()
    engine._runner = Broken(runner, "bad")
    prompts = {"good": [2, 3, 4, 5, 6], "bad": [7, 8, 9, 10, 11, 12], "late": [2, 3, 4, 5, 9]}
    for name, prompt in prompts.items():
        engine.add(make_request(name, prompt, max_tokens=4))
    results = run_all(engine)
    assert [result.corrupted for result in results if result.corrupted] == [("bad",)]
    told = {p.request_id for result in results for p in result.progress}
    assert told == {"good", "late"}
    assert not engine.abort("bad"), "it is over"
    for name in told:
        mine = [p for r in results for p in r.progress if p.request_id == name]
        expected, _ = expected_output(make_request(name, prompts[name], max_tokens=4), EOS)
        assert [token for p in mine for token in p.new_tokens] == expected
    assert engine.block_counts().free + engine.block_counts().cached == 32


def test_what_broke_logits_is_not_found_again() -> None:
    """Else every later request with this prefix would break on the same block."""
    engine, runner = make_engine()
    prompt = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    engine.add(make_request("before", prompt, max_tokens=1))
    run_all(engine)
    assert engine.cached_hashes()
    engine._runner = Broken(runner, "bad")
    engine.add(make_request("bad", [*prompt, 17, 18, 19], max_tokens=4))
    run_all(engine)
    assert engine.cached_hashes() == ()
    assert engine.block_counts().free == 32


@pytest.mark.parametrize("prefill_only", [False, True])
def test_broken_logits_of_a_prompt_whose_logprobs_are_asked_for(prefill_only: bool) -> None:
    engine, runner = make_engine()
    engine._runner = Broken(runner, "bad", first_row_only=True)
    prompt = [7, 8, 9, 10, 11, 12]
    engine.add(make_request("bad", prompt, prefill_only, max_tokens=4, prompt_logprobs=1))
    [result] = run_all(engine)
    assert (result.corrupted, result.progress) == (("bad",), ())
    assert engine.block_counts().free == 32


def test_a_request_that_is_aborted_while_its_logits_break() -> None:
    engine, runner = make_engine()
    engine._runner = Broken(runner, "bad")

    def abort() -> None:
        assert engine.abort("bad")

    runner.during_run = abort
    engine.add(make_request("bad", [7, 8, 9], max_tokens=4))
    run_all(engine)
    assert engine.block_counts().free == 32


def test_reservations_of_odd_size_are_refused() -> None:
    engine, _ = make_engine()
    for tokens, limit in (([], 10), ([1] * 10, 9), ([1] * 10, MAX_MODEL_LEN + 1)):
        with pytest.raises(ValueError, match="cannot reserve"):
            engine.reserve(tokens, limit)


def test_calls_from_another_thread_do_not_wait_for_the_model() -> None:
    """The lock is free while the runner runs: other threads' calls come back in the meantime."""
    engine, runner = make_engine()
    engine.add(make_request("a", [2, 3, 4], max_tokens=1))

    def others() -> None:
        engine.add(make_request("b", [5, 6], max_tokens=1))
        engine.abort("a")
        reservation = engine.reserve([7, 8, 9], 10)
        assert engine.begin_io(reservation.handles[0])
        engine.end_io(reservation.handles[0])
        engine.cancel_reservation(reservation.id)
        engine.load()

    def while_running() -> None:
        thread = Thread(target=others)
        thread.start()
        thread.join(timeout=10)
        assert not thread.is_alive(), "the lock is held during the forward pass"
        runner.during_run = lambda: None

    runner.during_run = while_running
    first = engine.step()
    assert first is not None
    assert first.progress == ()
    [second] = run_all(engine)
    assert second.progress[0].request_id == "b"


def test_a_preempted_prompt_has_each_logprob_once() -> None:
    """A request that grows takes the blocks of a prompt that is half computed."""
    engine, _ = make_engine(num_blocks=8, kv_overcommit=3.0, max_num_batched_tokens=3)
    engine.add(make_request("grows", [2, 3, 4], max_tokens=20, ignore_eos=True))
    prompt = [5 + i % 7 for i in range(24)]
    asks = make_request("asks", prompt, prefill_only=True, prompt_logprobs=1)
    engine.add(asks)
    told = [p for result in run_all(engine) for p in result.progress if p.request_id == "asks"]
    assert asks.num_preemptions
    assert told[-1].logprobs is not None
    after = [logits_after(state) for state in chain(prompt)]
    check_prompt_rows(told[-1].logprobs.prompt, after, prompt, 1)
