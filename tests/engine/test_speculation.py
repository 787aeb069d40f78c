"""Drafts change no output: by honest drafters on real models, and by drafters that mean harm.

The random walks of test_engine_core run with drafts too; here are single facts, and the drafters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.drafting.control import Controller
from engine.drafting.draft_model import DraftModel
from engine.drafting.drafter import Drafter
from engine.drafting.ngram import NgramDrafter
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import StepResult
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from kernels.cpu_ops import load_cpu_ops
from tests.engine.drafters import Mischief, Oracle, always
from tests.engine.hash_runner import VOCAB_SIZE, HashRunner, expected_output
from tests.engine.tiny_models import ARCHITECTURES, save_random_model
from wire.types import SamplingParams

EOS = frozenset([1])
BLOCK_SIZE = 4
needs_equal_bits = pytest.mark.skipif(
    load_cpu_ops() is None or not torch.backends.mkl.is_available(),  # type: ignore[no-untyped-call]
    reason="needs the compiled kernels and MKL",
)


def make_engine(
    speculation: Speculation | None,
    *,
    num_blocks: int = 60,
    budget: int = 24,
    kv_overcommit: float = 1.0,
) -> Engine:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=60,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        kv_overcommit=kv_overcommit,
    )
    return Engine(
        config,
        HashRunner(num_blocks, BLOCK_SIZE),
        epoch=5,
        model_fingerprint="m",
        eos_token_ids=EOS,
        speculation=speculation,
    )


def make_request(name: str, length: int, **sampling: Any) -> Request:
    tokens = [(7 * i + length) % VOCAB_SIZE for i in range(length)]
    params = SamplingParams(**{"max_tokens": 20, "seed": length, "ignore_eos": True, **sampling})
    return Request(name, tokens, length, params, 60)


def run_all(engine: Engine) -> list[StepResult]:
    results = []
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert result.num_tokens <= engine.config.max_num_batched_tokens
        engine.check_integrity()
        results.append(result)
    counts = engine.block_counts()
    assert counts.free + counts.cached == counts.total
    return results


def outputs_with(drafter: Oracle | Mischief, most: int = 4) -> list[StepResult]:
    """Steps of four requests, whose output is checked."""
    engine = make_engine(always(drafter, most, VOCAB_SIZE))
    requests = [make_request(f"r{n}", n, temperature=n % 2) for n in (3, 5, 9, 14)]
    expected = [expected_output(request, EOS)[0] for request in requests]
    for request in requests:
        engine.add(request)
    results = run_all(engine)
    assert [request.output_tokens for request in requests] == expected
    return results


def comes_to(request: Request) -> list[int]:
    """All tokens that a request will have."""
    prompt = request.tokens[: request.num_prompt_tokens]
    alone = Request("x", prompt, len(prompt), request.sampling, request.max_num_tokens)
    return [*prompt, *expected_output(alone, EOS)[0]]


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_right_and_wrong_drafts(share: float) -> None:
    results = outputs_with(Oracle(comes_to, share, vocab_size=VOCAB_SIZE))
    counted = [draft for r in results if r.speculation for draft in r.speculation.drafts]
    drafted, accepted = (sum(numbers) for numbers in zip(*counted, strict=True))
    assert drafted > 0
    assert (accepted == 0) == (share == 0)
    assert (accepted == drafted) == (share == 1)
    if share == 1:  # 20 tokens of each request: one by the prompt's step, then five by step
        assert len(results) <= 8


@pytest.mark.parametrize(
    "drafts",
    [
        [[VOCAB_SIZE], [-1, 3], [3, 1 << 40, 4]],
        [list(range(20)) * 50],
        [[], [5], []],
        [["three"], [2.5], [None]],
    ],
)
def test_tokens_that_there_are_not_and_too_many(drafts: Sequence[Sequence[Any]]) -> None:
    outputs_with(Mischief(drafts))


@pytest.mark.parametrize(
    ("draft", "kept"),
    [
        ([3, 4, 5, 6, 7, 8], (3, 4, 5, 6)),
        ([3, VOCAB_SIZE, 4], (3,)),
        ([3, 4, -1], (3, 4)),
        ([1 << 40], None),
        ([], None),
    ],
)
def test_drafts_are_cut_before_anybody_computes_them(
    draft: list[int], kept: tuple[int, ...] | None
) -> None:
    """A model has no embedding for a token that there is not; the runner here would not mind."""
    speculation = always(Mischief([draft]), 4, VOCAB_SIZE)
    assert speculation.propose([make_request("r", 5)]).get("r") == kept


@pytest.mark.parametrize(("max_tokens", "most"), [(1, 0), (2, 1), (3, 2), (9, 4)])
def test_nothing_is_drafted_behind_the_last_token_that_may_be(max_tokens: int, most: int) -> None:
    """Each drafted token lets one more be sampled behind it; the last one is never computed."""
    speculation = always(Mischief([[3] * 9]), 4, VOCAB_SIZE)
    request = make_request("r", 5, max_tokens=max_tokens)
    assert len(speculation.propose([request]).get("r", ())) == most


def test_a_drafter_that_raises_is_not_asked_again() -> None:
    drafter = Mischief([[1, 2]], fail_after=3)
    results = outputs_with(drafter)
    failures = [r.speculation.failure for r in results if r.speculation and r.speculation.failure]
    assert len(failures) == 1
    assert "mischief" in failures[0]
    assert "the drafter broke" in failures[0]
    assert drafter.num_calls == 4


def test_a_drafter_that_stalls_is_not_asked_again() -> None:
    ticks: Iterator[int] = count(step=10)  # every look at this clock is ten seconds later
    drafter = Mischief([[1, 2]])
    engine = make_engine(always(drafter, 4, VOCAB_SIZE, lambda: float(next(ticks))))
    request = make_request("r", 5)
    engine.add(request)
    results = run_all(engine)
    assert drafter.num_calls == 1
    assert [bool(r.speculation and r.speculation.failure) for r in results].count(True) == 1
    assert request.tokens == comes_to(request)


def test_the_control_hears_of_every_decoding_step() -> None:
    """Of what they took and how much was right: else it would go on for ever."""
    controller = Controller(4)
    ticks = count()
    drafter = Oracle(comes_to, 0.0, vocab_size=VOCAB_SIZE)
    speculation = Speculation(
        drafter, controller, vocab_size=VOCAB_SIZE, clock=lambda: float(next(ticks))
    )
    engine = make_engine(speculation)
    for number in range(3):
        engine.add(make_request(f"r{number}", 4 + number, max_tokens=40))
    run_all(engine)
    assert controller.plain_seconds(30, 3) > 0


def test_who_opts_out_is_not_drafted() -> None:
    drafter = Oracle(comes_to, 1.0, vocab_size=VOCAB_SIZE)
    engine = make_engine(always(drafter, 4, VOCAB_SIZE))
    engine.add(make_request("plain", 4, speculate=False))
    engine.add(make_request("drafted", 4))
    for result in run_all(engine):
        for progress in result.progress:
            assert progress.request_id == "drafted" or len(progress.new_tokens) <= 1


def test_a_stop_token_within_a_draft_ends_the_request_there() -> None:
    plain = expected_output(make_request("r", 6), EOS)[0]
    stop = next(token for token in plain[3:12] if token not in plain[:3])
    request = make_request("r", 6, stop_token_ids=(stop,), logprobs=2)
    engine = make_engine(always(Oracle(lambda _: [0] * 6 + plain, 1.0, vocab_size=99), 9, 99))
    engine.add(request)
    last = run_all(engine)[-1].progress[0]
    assert request.output_tokens == plain[: plain.index(stop) + 1]
    assert last.finish_reason is not None
    assert last.logprobs is not None
    assert len(last.logprobs.tokens) == len(last.new_tokens)


def test_drafts_preempt_nobody_and_leave_prompts_their_share() -> None:
    """A full pool, and a prompt that is computed beside: it gets half of what decoding leaves."""
    drafter = Oracle(comes_to, 1.0, vocab_size=VOCAB_SIZE)
    engine = make_engine(always(drafter, 9, VOCAB_SIZE), num_blocks=20, budget=8)
    first = make_request("a", 10)
    engine.add(first)
    while not first.num_output_tokens:
        engine.step()
    engine.add(make_request("b", 30, max_tokens=4))
    beside = engine.step()
    assert beside is not None
    computed = {p.request_id: p.num_computed_tokens for p in beside.progress}
    assert computed["b"] == 4  # of 8, one is the first's, and of seven three are kept
    assert sum(result.num_preempted for result in run_all(engine)) == 0
    assert first.tokens == comes_to(first)


def test_blocks_for_drafts_come_back_when_a_step_fails() -> None:
    engine = make_engine(always(Oracle(comes_to, 1.0, vocab_size=VOCAB_SIZE), 9, VOCAB_SIZE))
    runner: Any = engine._runner
    request = make_request("r", 6)
    engine.add(request)
    engine.step()
    held = len(request.block_table)

    def fail() -> None:
        raise RuntimeError("on purpose")

    runner.during_run = fail
    with pytest.raises(RuntimeError):
        engine.step()
    engine.check_integrity()
    assert len(request.block_table) <= held + 1  # that of the token that was to be computed
    runner.during_run = lambda: None
    run_all(engine)
    assert request.tokens == comes_to(request)


# ------------------------------------------------------------ real models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """A target, and a draft model that knows nothing of it."""
    folders = [tmp_path_factory.mktemp(name) for name in ("target", "draft")]
    name, changes = ARCHITECTURES["llama"]
    save_random_model(name, changes, folders[0])
    save_random_model(name, {**changes, "num_hidden_layers": 1}, folders[1])
    target, draft = (load_model(folder) for folder in folders)
    return target, draft


MakeDrafter = Callable[[LoadedModel, LoadedModel], Drafter]


def by_model(model: LoadedModel, num_blocks: int = 200) -> DraftModel:
    store = KVStore(model.kv_layout(BLOCK_SIZE), num_blocks)
    sampler = Sampler(frozenset(model.eos_token_ids), model.ops)
    return DraftModel(
        ModelRunner(model, store),
        sampler,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_model_len=100,
    )


DRAFTERS: dict[str, MakeDrafter] = {
    "ngram": lambda target, draft: NgramDrafter(1, 3),
    "draft_model": lambda target, draft: by_model(draft),
    "itself": lambda target, draft: by_model(target),
    "little_memory": lambda target, draft: by_model(target, 12),
}


def model_engine(
    target: LoadedModel, speculation: Speculation | None, chunk: int, overcommit: float
) -> Engine:
    num_blocks = 200 if overcommit == 1 else 40
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=100,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=chunk,
        kv_overcommit=overcommit,
    )
    return Engine(
        config,
        ModelRunner(target, KVStore(target.kv_layout(BLOCK_SIZE), num_blocks)),
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(target.eos_token_ids),
        ops=target.ops,
        speculation=speculation,
    )


def mixed_requests() -> list[Request]:
    """Greedy and sampled ones, with all that changes logits, and one that is not drafted."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3},
        {"temperature": 0.7, "top_p": 0.9, "frequency_penalty": 0.4},
        {"temperature": 1.0, "top_k": 9, "min_tokens": 12, "presence_penalty": 0.5},
        {"temperature": 0.3, "logit_bias": {5: 3.0}, "ignore_eos": True},
        {"temperature": 0.8, "speculate": False},
    ]
    requests = []
    for number, kind in enumerate(kinds):
        prompt = [(5 * i + number) % 9 + 3 for i in range(4 + 5 * number)]
        sampling = SamplingParams(seed=number, max_tokens=26, **kind)
        requests.append(Request(f"r{number}", prompt, len(prompt), sampling, 100))
    return requests


def transcripts(engine: Engine) -> tuple[dict[str, object], int]:
    """Tokens and logprobs of the mixed requests, and how many draft tokens were right."""
    requests = mixed_requests()
    for request in requests:
        engine.add(request)
    told: dict[str, list[bytes]] = {request.request_id: [] for request in requests}
    accepted = 0
    for result in run_all(engine):
        for progress in result.progress:
            told[progress.request_id] += progress.logprobs.tokens if progress.logprobs else ()
        if result.speculation:
            accepted += sum(number for _, number in result.speculation.drafts)
    found = {r.request_id: (r.output_tokens, r.finish_reason, told[r.request_id]) for r in requests}
    return dict(found), accepted


@needs_equal_bits
@pytest.mark.parametrize(("chunk", "overcommit"), [(0, 1.0), (3, 1.0), (0, 4.0)])
@pytest.mark.parametrize("name", DRAFTERS)
def test_transcripts_are_the_same_to_the_bit(
    models: tuple[LoadedModel, LoadedModel], name: str, chunk: int, overcommit: float
) -> None:
    target, _ = models
    plain, _ = transcripts(model_engine(target, None, 0, 1.0))
    for most in (1, 5):
        drafter = DRAFTERS[name](*models)
        controller = Controller(most, adaptive=False)
        speculation = Speculation(drafter, controller, vocab_size=97, clock=float)
        engine = model_engine(target, speculation, chunk, overcommit)
        drafted, accepted = transcripts(engine)
        assert drafted == plain
        assert accepted > 0 or name == "draft_model"
        if isinstance(drafter, DraftModel):
            drafter.check_integrity()


@needs_equal_bits
def test_a_draft_model_that_is_the_target_is_always_right(
    models: tuple[LoadedModel, LoadedModel],
) -> None:
    """Also at a temperature, as both draw with the same noise; without it hardly ever."""
    target, _ = models
    drafter = by_model(target)
    speculation = Speculation(drafter, Controller(4, adaptive=False), vocab_size=97, clock=float)
    engine = model_engine(target, speculation, 0, 1.0)
    request = Request(
        "r", [3, 4, 5], 3, SamplingParams(seed=3, max_tokens=30, ignore_eos=True), 100
    )
    engine.add(request)
    drafts = [d for r in run_all(engine) if r.speculation for d in r.speculation.drafts]
    assert drafts
    assert all(drafted == accepted for drafted, accepted in drafts)
    assert drafter.num_blocks_held > 0  # until it hears that nobody is left
    drafter.propose([])
    assert drafter.num_blocks_held == 0
