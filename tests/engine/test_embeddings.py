"""Embeddings equal what transformers' final hidden states pool to, in chunks and mixed steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.plan import RequestProgress
from engine.request import Request
from engine.runner import ModelRunner
from tests.engine.hash_runner import HashRunner, chain, expected_output, hidden_state
from tests.engine.tiny_models import ARCHITECTURES
from wire.errors import UnsupportedModelError
from wire.types import Pooling, SamplingParams

LAST, MEAN = Pooling.LAST, Pooling.MEAN
BLOCK_SIZE = 4
NUM_BLOCKS = 64


def config(max_num_batched_tokens: int, num_blocks: int = NUM_BLOCKS) -> EngineConfig:
    return EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=128,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_overcommit=4.0,
    )


def model_engine(folder: Path, budget: int, *, fusing: bool = True) -> Engine:
    loaded = load_model(folder, dtype="float32", fusing=fusing)
    assert loaded.can_embed
    runner = ModelRunner(loaded, KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS))
    return Engine(config(budget), runner, epoch=1, model_fingerprint="m", eos_token_ids=frozenset())


def hash_engine(budget: int, num_blocks: int = NUM_BLOCKS) -> Engine:
    runner, settings = HashRunner(num_blocks, BLOCK_SIZE), config(budget, num_blocks)
    return Engine(settings, runner, epoch=1, model_fingerprint="m", eos_token_ids=frozenset())


def embed(engine: Engine, name: str, tokens: list[int], pooling: Pooling) -> Request:
    request = Request(
        request_id=name,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_tokens=1),
        max_num_tokens=len(tokens) + 1,
        prefill_only=True,
        pooling=pooling,
    )
    engine.add(request)
    return request


def generate(engine: Engine, name: str, tokens: list[int], max_tokens: int = 8) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    request = Request(name, list(tokens), len(tokens), sampling, 128)
    engine.add(request)
    return request


def run(engine: Engine) -> dict[str, RequestProgress]:
    """By request, the progress that brought an embedding."""
    found: dict[str, RequestProgress] = {}
    while engine.has_work():
        result = engine.step()
        assert result is not None
        for progress in result.progress:
            if progress.embedding is not None:
                assert progress.new_tokens == ()
                assert progress.request_id not in found
                found[progress.request_id] = progress
        engine.check_integrity()
    return found


def vector(progress: RequestProgress) -> Tensor:
    assert progress.embedding is not None
    return torch.from_numpy(np.frombuffer(progress.embedding, "<f4").copy())


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 97) for _ in range(length)]


def pooled(states: Tensor, pooling: Pooling) -> Tensor:
    one = states[-1] if pooling is LAST else states.mean(0)
    return torch.nn.functional.normalize(one, dim=0)


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_equal_transformers(name: str, make_model: Callable[[str], Path]) -> None:
    folder = make_model(name)
    try:
        engine = model_engine(folder, budget=11)
    except UnsupportedModelError:
        pytest.skip("not served")
    if name in ("llama_dynamic", "phi3_longrope"):
        pytest.skip("transformers changes their frequencies with the length")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = {f"{pooling}-{n}": prompt(n, n) for n in (1, 4, 30) for pooling in Pooling}
    for request_id, tokens in prompts.items():
        embed(engine, request_id, tokens, Pooling(request_id.split("-")[0]))
    found = run(engine)
    for request_id, tokens in prompts.items():
        with torch.inference_mode():
            states = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
        expected = pooled(states, Pooling(request_id.split("-")[0]))
        torch.testing.assert_close(vector(found[request_id]), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fusing", [True, False])
def test_beside_generation(fusing: bool, make_model: Callable[[str], Path]) -> None:
    """Neither changes what the other gives."""
    folder, tokens = make_model("llama"), prompt(30, 1)
    alone = model_engine(folder, budget=64, fusing=fusing)
    expected = generate(alone, "g", prompt(9, 2))
    embed(alone, "mean", tokens, MEAN)
    run(alone)
    engine = model_engine(folder, budget=7, fusing=fusing)
    generated = generate(engine, "g", prompt(9, 2))
    embed(engine, "mean", tokens, MEAN)
    embed(engine, "last", tokens, LAST)
    found = run(engine)
    assert generated.tokens == expected.tokens
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        states = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
    for name in ("mean", "last"):
        expected_vector = pooled(states, Pooling(name))
        torch.testing.assert_close(vector(found[name]), expected_vector, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- blocks and the cache


def hashed(tokens: list[int], pooling: Pooling) -> Tensor:
    return pooled(torch.stack([hidden_state(state) for state in chain(tokens)]), pooling)


@pytest.mark.parametrize("budget", [3, 5, 64])
def test_chunks_and_cache(budget: int) -> None:
    engine, tokens = hash_engine(budget), prompt(21, 3)
    for turn in range(2):  # all blocks are cached in the second one
        embed(engine, f"mean{turn}", tokens, MEAN)
        embed(engine, f"last{turn}", tokens, LAST)
        found = run(engine)
        for name in ("mean", "last"):
            told = vector(found[f"{name}{turn}"])
            torch.testing.assert_close(told, hashed(tokens, Pooling(name)))
        assert found[f"mean{turn}"].num_cached_tokens == 0
    assert found["last1"].num_cached_tokens == 20
    counts = engine.block_counts()
    assert counts.free + counts.cached == NUM_BLOCKS
    assert counts.cached == 5, "the blocks are of use to others"


def test_preempted_it_begins_anew() -> None:
    engine = hash_engine(budget=4, num_blocks=10)
    first = generate(engine, "g", prompt(8, 4), max_tokens=24)
    while first.num_output_tokens < 4:
        engine.step()
    waiting = embed(engine, "mean", prompt(24, 5), MEAN)
    found = run(engine)
    assert waiting.num_preemptions > 0, "the test must preempt"
    torch.testing.assert_close(vector(found["mean"]), hashed(prompt(24, 5), MEAN))
    assert first.output_tokens == expected_output(first, frozenset())[0]


def test_aborted_in_the_middle_of_a_step() -> None:
    engine = hash_engine(budget=64)
    runner = engine._runner
    assert isinstance(runner, HashRunner)
    embed(engine, "a", prompt(9, 6), MEAN)
    runner.during_run = partial(engine.abort, "a")
    result = engine.step()
    assert result is not None
    assert result.progress == ()
    assert not engine.has_work()
    counts = engine.block_counts()
    assert counts.free + counts.cached == NUM_BLOCKS


def test_broken_states_are_their_requests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = hash_engine(budget=64)
    runner = engine._runner
    assert isinstance(runner, HashRunner)
    embed(engine, "bad", prompt(9, 7), MEAN)
    embed(engine, "good", prompt(5, 8), LAST)
    real = runner._hidden

    def broken(plan: Any) -> Tensor:
        states = real(plan)
        if "bad" in {item.request.request_id for item in plan.scheduled}:
            states[0, 0] = torch.nan
        return states

    monkeypatch.setattr(runner, "_hidden", broken)
    result = engine.step()
    assert result is not None
    assert result.corrupted == ("bad",)
    assert [p.request_id for p in result.progress if p.embedding] == ["good"]
    assert not engine.has_work()
