"""Steps that are launched before the ones before them are read: same tokens, same books.

The device here is one whose tokens are not to be read but by waiting for them, and what runs on it
is a hash of all tokens, so a token that is taken from the wrong row, or too early, shows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import engine.in_flight
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.engine import Engine
from engine.lookahead import OBSTACLES, can_look_beyond
from engine.plan import ScheduledRequest, StepPlan, StepResult
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step_inputs import with_sampled
from tests.engine.hash_runner import VOCAB_SIZE, HashRunner, expected_output
from wire.types import BeamParams, FinishReason, SamplingParams

EOS = frozenset([1])
BLOCK_SIZE = 4
MAX_LEN = 48


class OnDevice(Tensor):
    """A tensor that the host must not look into."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in {"tolist", "item", "__bool__", "numpy", "cpu"}, f"{name} waits"
        base: Any = super()
        return base.__torch_function__(func, types, args, kwargs or {})


class Device:
    """Engines on it compute at once, but tokens arrive when they are waited for.

    `log` says what was launched and waited for, by the number of the step.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, int]] = []
        self.num_launched = 0
        device = self

        class LateCopy:
            def __init__(self, tokens: Tensor) -> None:
                assert isinstance(tokens, OnDevice)
                self._tokens, self._number = tokens.as_subclass(Tensor), device.num_launched
                device.num_launched += 1
                device.log.append(("launch", self._number))

            def wait(self) -> list[int]:
                device.log.append(("wait", self._number))
                return [int(token) for token in self._tokens.tolist()]

        monkeypatch.setattr(engine.in_flight, "TokenCopy", LateCopy)

    def engine(self, *, lookahead: bool = True, **sizes: Any) -> tuple[Engine, HashRunner]:
        given = {"num_blocks": 64, "max_num_seqs": 6, "max_num_batched_tokens": 16} | sizes
        config = EngineConfig(BLOCK_SIZE, max_model_len=MAX_LEN, lookahead=lookahead, **given)
        runner = HashRunner(config.num_blocks, BLOCK_SIZE)
        made = Engine(config, runner, epoch=5, model_fingerprint="m", eos_token_ids=EOS)
        draw: Any = made._sampler.draw

        def drawn(*args: Any) -> Any:
            return draw(*args).as_subclass(OnDevice)

        sampler: Any = made._sampler
        sampler.draw = drawn
        return made, runner

    @property
    def num_ahead(self) -> int:
        """Steps that were launched before the one before them was waited for."""
        return sum(
            self.log.index(("launch", n)) < self.log.index(("wait", n - 1))
            for n in range(1, self.num_launched)
            if ("wait", n - 1) in self.log
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def make_request(name: str, num_tokens: int = 7, **sampling: Any) -> Request:
    tokens = [(len(name) * 5 + ord(name[0]) + i * i) % VOCAB_SIZE for i in range(num_tokens)]
    params = SamplingParams(**{"max_tokens": 9, "seed": ord(name[0])} | sampling)
    return Request(name, tokens, num_tokens, params, MAX_LEN)


def run_all(made: Engine) -> list[StepResult]:
    results = []
    while made.has_work():
        result = made.step()
        made.check_integrity()
        if result is not None:
            results.append(result)
    counts = made.block_counts()
    assert counts.free + counts.cached == counts.total
    return results


def check_output(results: list[StepResult], *requests: Request) -> None:
    """Each got what it gets alone, told in order and once."""
    for request in requests:
        mine = [p for r in results for p in r.progress if p.request_id == request.request_id]
        alone = make_request(request.request_id, request.num_prompt_tokens)
        alone.sampling = request.sampling
        tokens, reason = expected_output(alone, EOS)
        assert [token for p in mine for token in p.new_tokens] == tokens
        assert [p.finish_reason for p in mine if p.finish_reason] == [reason]
        assert [p.index for p in mine if p.new_tokens] == list(range(len(tokens)))


# ------------------------------------------------------------ the steady loop


def test_a_step_is_waited_for_once_the_next_one_is_launched(device: Device) -> None:
    made, _ = device.engine()
    request = make_request("a", max_tokens=6, ignore_eos=True)
    made.add(request)
    check_output(run_all(made), request)
    steady = [("launch", 0)]
    for number in range(5):  # a sixth step would be for nothing, and that is known
        steady += [("launch", number + 1), ("wait", number)]
    assert device.log == [*steady, ("wait", 5)]


def test_without_lookahead_nothing_is_launched_ahead(device: Device) -> None:
    made, _ = device.engine(lookahead=False)
    request = make_request("a")
    made.add(request)
    check_output(run_all(made), request)
    assert device.num_ahead == 0


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("budget", [3, 16])
@pytest.mark.parametrize("num_blocks", [13, 64])  # the small pool preempts
def test_tokens_are_what_each_request_gets_alone(
    device: Device, lookahead: bool, budget: int, num_blocks: int
) -> None:
    made, _ = device.engine(
        lookahead=lookahead,
        num_blocks=num_blocks,
        max_num_batched_tokens=budget,
        kv_overcommit=4.0,
    )
    requests = [
        make_request("greedy", temperature=0.0, max_tokens=20),
        make_request("long prompt", 21, ignore_eos=True),
        make_request("stops", stop_token_ids=(3, 5, 7, 9, 11), max_tokens=30),
        make_request("filtered", top_p=0.8, top_k=7, max_tokens=25, ignore_eos=True),
        make_request("not too soon", min_tokens=6, max_tokens=25),
        make_request("biased", logit_bias={4: 3.0, 8: -5.0}),
        make_request("one", max_tokens=1),
        make_request("two", max_tokens=2, ignore_eos=True),
        *(make_request(f"choice {n}", 13, seed=n, max_tokens=15) for n in range(4)),
    ]
    for request in requests:
        made.add(request)
    results = run_all(made)
    check_output(results, *requests)
    if num_blocks == 13:
        assert sum(result.num_preempted for result in results) > 0
    if lookahead:
        assert device.num_ahead > device.num_launched // 3
    else:
        assert device.num_ahead == 0


def test_who_shares_a_prompt_shares_its_blocks(device: Device) -> None:
    """A block that a step in flight computes is waited for, not computed twice."""
    num_computed = []
    for lookahead in (False, True):
        made, _ = device.engine(lookahead=lookahead, max_num_batched_tokens=6)
        for number in range(3):
            request = make_request("same", 21, max_tokens=2, ignore_eos=True)
            request.request_id = str(number)
            made.add(request)
        num_computed.append(sum(result.num_tokens for result in run_all(made)))
    assert num_computed[0] == num_computed[1]


# ------------------------------------------------------------ who turns out to be over


def test_who_stops_leaves_with_the_step_that_was_launched_for_nothing(device: Device) -> None:
    made, _ = device.engine(enable_prefix_caching=False)
    stops = make_request("s", max_tokens=30, ignore_eos=True)
    tokens, _ = expected_output(stops, EOS)
    stops = make_request("s", max_tokens=30, ignore_eos=True, stop_token_ids=(tokens[4],))
    made.add(stops)
    result = made.step()
    while result is not None and not stops.finish_reason:
        result = made.step()
    assert result is not None
    assert result.progress[0].finish_reason is FinishReason.STOP
    held = len(stops.block_table)
    assert held, "the step in flight writes to its blocks"
    assert made.block_counts().running == held
    assert not made.abort("s"), "it is over"
    assert made.has_work()
    result = made.step()
    assert result is not None
    assert (result.progress, result.corrupted) == ((), ())
    assert made.block_counts().running == 0
    assert not made.has_work()


@pytest.mark.parametrize("when", [0, 1, 2, 3, 5])
def test_an_abort_with_two_steps_in_flight(device: Device, when: int) -> None:
    """At any call of the runner: before, while and after the step is looked beyond."""
    made, runner = device.engine()
    gone, stays = make_request("gone", max_tokens=20), make_request("stays", ignore_eos=True)
    made.add(gone)
    made.add(stays)
    calls = 0

    def abort() -> None:
        nonlocal calls
        if calls == when:
            assert made.abort("gone")
            assert not made.abort("gone")
        calls += 1

    runner.during_run = abort
    told: list[str] = []
    results = []
    while made.has_work():
        before = calls
        result = made.step()
        made.check_integrity()
        assert result is not None
        results.append(result)
        if before > when:
            told += [p.request_id for p in result.progress]
    assert "gone" not in told
    check_output(results, stays)
    counts = made.block_counts()
    assert counts.free + counts.cached == counts.total


def test_a_request_comes_and_goes_while_steps_are_in_flight(device: Device) -> None:
    made, runner = device.engine()
    first, second = make_request("first"), make_request("second", 14)
    made.add(first)
    runner.during_run = lambda: made.add(second) if second.num_computed_tokens == 0 else None

    def once() -> None:
        made.add(second)
        runner.during_run = lambda: None

    runner.during_run = once
    check_output(run_all(made), first, second)


# ------------------------------------------------------------ what goes wrong


class RunnerBroke(Exception):
    """On purpose."""


def fail_at(runner: HashRunner, *calls: int, error: type[Exception] = RunnerBroke) -> None:
    """Let these calls of the runner, counted from 0, fail."""
    counted = iter(range(1000))

    def maybe() -> None:
        if next(counted) in calls:
            raise error

    runner.during_run = maybe


@pytest.mark.parametrize("call", range(1, 6))
def test_a_launch_ahead_that_fails_is_made_again(device: Device, call: int) -> None:
    made, runner = device.engine()
    requests = [make_request("a"), make_request("b", 12)]
    for request in requests:
        made.add(request)
    fail_at(runner, call)
    check_output(run_all(made), *requests)


def test_what_fails_ahead_fails_with_its_own_requests(device: Device) -> None:
    """The step before it is told first; then the error comes through, and names who was in it."""
    made, runner = device.engine()
    request = make_request("a", ignore_eos=True)
    made.add(request)
    fail_at(runner, 1, 2)
    first = made.step()
    assert first is not None
    assert first.progress[0].new_tokens
    with pytest.raises(RunnerBroke):
        made.step()
    assert made.step_request_ids == ("a",)
    made.check_integrity()
    check_output([first, *run_all(made)], request)


def test_a_step_that_cannot_be_read_takes_the_next_one_with_it(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = device.engine()
    requests = [make_request("a", ignore_eos=True), make_request("b", 18, ignore_eos=True)]
    for request in requests:
        made.add(request)
    results = [made.step() for _ in range(3)]
    real = engine.in_flight._corrupted

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(engine.in_flight, "_corrupted", real)
        raise RunnerBroke

    monkeypatch.setattr(engine.in_flight, "_corrupted", broken)
    with pytest.raises(RunnerBroke):
        made.step()
    made.check_integrity()
    last = device.num_launched - 1
    assert device.log[-2:] == [("wait", last - 1), ("wait", last)], "nothing writes any more"
    assert all(r.num_computed_tokens < r.num_tokens == len(r.tokens) for r in requests)
    check_output([r for r in results if r is not None] + run_all(made), *requests)


def test_memory_that_ends_ahead_is_a_matter_of_the_next_step(device: Device) -> None:
    made, runner = device.engine()
    requests = [make_request("a", ignore_eos=True), make_request("b", 12, ignore_eos=True)]
    for request in requests:
        made.add(request)
    fail_at(runner, 3, 4, error=torch.OutOfMemoryError)
    results = run_all(made)
    assert sum(result.num_retries for result in results) == 1
    check_output(results, *requests)
    assert device.num_ahead == 2, "small steps are not looked beyond"


class Broken(HashRunner):
    """The logits of one request are no numbers in one call."""

    calls = 0

    def run(self, plan: StepPlan, *args: Any) -> Tensor:
        logits, row = super().run(plan, *args), 0
        self.calls += 1
        for item in plan.scheduled:
            if item.request.request_id == "bad" and self.calls == 4:
                logits[row : row + item.num_logits] = torch.nan
            row += item.num_logits
        return logits


def test_broken_logits_end_their_request_once(device: Device) -> None:
    made, _ = device.engine()
    made._runner = Broken(64, BLOCK_SIZE)
    bad, good = make_request("bad", ignore_eos=True), make_request("good", ignore_eos=True)
    made.add(bad)
    made.add(good)
    results = run_all(made)
    assert [r.corrupted for r in results if r.corrupted] == [("bad",)]
    check_output(results, good)
    assert device.num_ahead > 3
    assert bad.block_hashes
    assert not {*bad.block_hashes} & {*made.cached_hashes()}, "what broke them is not found again"


# ------------------------------------------------------------ what cannot be looked beyond


def item_of(
    prefill_only: bool = False, draft: tuple[int, ...] = (), **sampling: Any
) -> ScheduledRequest:
    request = make_request("a", **sampling)
    request.prefill_only = prefill_only
    return ScheduledRequest(request, 6, 1 + len(draft), draft)


def with_copy() -> ScheduledRequest:
    item = item_of()
    item.request.copied_block = (1, 2)
    return item


CASES: dict[str, Callable[[], ScheduledRequest]] = {
    "begins_with_copy": with_copy,
    "is_handed_off": lambda: item_of(prefill_only=True),
    "searches": lambda: item_of(beam=BeamParams(2)),
    "drafts": lambda: item_of(draft=(3,)),
    "follows_grammar": lambda: item_of(grammar="{}"),
    "counts_tokens": lambda: item_of(presence_penalty=0.5),
    "tells_logprobs": lambda: item_of(logprobs=0),
    "tells_logprobs of the prompt": lambda: item_of(prompt_logprobs=0),
}


def test_every_obstacle_has_a_case() -> None:
    assert {obstacle.__name__ for obstacle in OBSTACLES} == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_looked_beyond(case: str) -> None:
    plain, item = item_of(), CASES[case]()
    assert can_look_beyond(StepPlan((plain,)))
    assert [o.__name__ for o in OBSTACLES if o(item)] == [case.split()[0]]
    assert not can_look_beyond(StepPlan((plain, item)))


def test_a_chunk_that_samples_nothing_hides_nothing() -> None:
    """Only the tokens of a step are missing when it is looked beyond."""
    request = make_request("a", 7, presence_penalty=0.5, logprobs=0, grammar="{}")
    assert can_look_beyond(StepPlan((ScheduledRequest(request, 0, 6),)))
    assert not can_look_beyond(StepPlan((ScheduledRequest(request, 0, 7),)))
    told = make_request("b", 7, prompt_logprobs=0)
    assert not can_look_beyond(StepPlan((ScheduledRequest(told, 0, 6),)))


@pytest.mark.parametrize(
    "sampling",
    [{"frequency_penalty": 1.5}, {"repetition_penalty": 3.0}, {"logprobs": 2}],
    ids=str,
)
def test_steps_with_such_requests_end_before_the_next_begins(
    device: Device, sampling: dict[str, Any]
) -> None:
    made, _ = device.engine()
    special = make_request("special", max_tokens=8, ignore_eos=True, **sampling)
    plain = make_request("plain", max_tokens=20, ignore_eos=True)
    made.add(special)
    made.add(plain)
    results = run_all(made)
    check_output(results, special, plain)
    assert 5 < device.num_ahead < device.num_launched - 7


def test_a_prompt_for_another_node_is_told_at_once(device: Device) -> None:
    made, _ = device.engine()
    handed = make_request("h", 40)
    handed.prefill_only = True
    made.add(handed)
    results = run_all_held(made)
    assert device.num_ahead == 0
    assert results[-1].progress[0].new_tokens


def run_all_held(made: Engine) -> list[StepResult]:
    results = []
    while made.has_work():
        result = made.step()
        assert result is not None
        results.append(result)
    return results


def test_a_plan_that_would_have_to_preempt_is_made_when_the_step_is_over() -> None:
    """Else whoever needs a block would stand still while the others go on."""
    config = EngineConfig(BLOCK_SIZE, 3, MAX_LEN, kv_overcommit=9.0, enable_prefix_caching=False)
    pool = BlockPool(3, 1)
    scheduler = Scheduler(config, pool, PrefixCache(pool, BLOCK_SIZE, "m", enabled=False), EOS)
    old = make_request("old", 8, max_tokens=4, ignore_eos=True)  # needs a third block next
    new = make_request("new", 2, max_tokens=4, ignore_eos=True)
    scheduler.add(old)
    scheduler.add(new)
    step = scheduler.plan()
    assert [item.request for item in step.scheduled] == [old, new]
    assert scheduler.plan_ahead(step).scheduled == ()
    scheduler.check_integrity()
    scheduler.commit(step, [5, 5])
    following = scheduler.plan()
    assert (following.num_preempted, [i.request for i in following.scheduled]) == (1, [old])


# ------------------------------------------------------------ what the device reads


def test_unknown_tokens_are_taken_from_the_step_before() -> None:
    sampled = torch.tensor([7, -1, 9])
    ids = torch.tensor([4, -1, -3, 0, -2], dtype=torch.int32)
    assert with_sampled(ids, sampled).tolist() == [4, 7, 9, 0, 0]  # a corrupted one is no index
    assert with_sampled(ids[:1], torch.zeros(0, dtype=torch.int64)).tolist() == [4]
