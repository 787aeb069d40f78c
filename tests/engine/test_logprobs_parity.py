"""Logprobs of prompts and of output equal transformers' log-softmax, in chunks and with a cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.plan import MAX_PROMPT_LOGITS, RequestProgress
from engine.request import Request
from engine.runner import ModelRunner
from tests.engine.expected_logprobs import check_prompt_rows, check_row
from wire.types import SamplingParams

NAMES = ["llama", "gpt2"]
BLOCK_SIZE = 4


def build(folder: Path, max_num_batched_tokens: int) -> Engine:
    loaded = load_model(folder, dtype="float32")
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=128,
        max_model_len=128,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    runner = ModelRunner(loaded, KVStore(loaded.kv_layout(BLOCK_SIZE), config.num_blocks))
    return Engine(config, runner, epoch=1, model_fingerprint="m", eos_token_ids=frozenset())


def add(engine: Engine, name: str, tokens: list[int], **options: Any) -> Request:
    prefill_only = options.pop("prefill_only", False)
    request = Request(
        request_id=name,
        tokens=list(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(max_tokens=5, **options),
        max_num_tokens=engine.config.max_model_len,
        prefill_only=prefill_only,
    )
    engine.add(request)
    return request


def run(engine: Engine) -> dict[str, list[RequestProgress]]:
    """By request, the progress that brought a token."""
    told: dict[str, list[RequestProgress]] = {}
    while engine.has_work():
        result = engine.step()
        assert result is not None
        for progress in result.progress:
            if progress.new_tokens:
                told.setdefault(progress.request_id, []).append(progress)
    return told


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_equal_transformers(name: str, make_model: Callable[[str], Path]) -> None:
    folder = make_model(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = build(folder, max_num_batched_tokens=11)
    generator = random.Random(3)
    tokens = [generator.randrange(3, 97) for _ in range(50)]
    asks = {"prompt_logprobs": 3, "logprobs": 2, "prefill_only": True}
    first = add(engine, "first", tokens, temperature=0, **asks)
    neighbour = add(engine, "neighbour", tokens[:9], logprobs=0, logit_bias={5: 50.0})
    told = run(engine)
    engine.release_held("first")
    again = add(engine, "again", tokens, temperature=0, **asks)  # all blocks are cached by now
    told |= run(engine)

    for request in (first, again):
        logits = reference(model, request.tokens)
        (progress,) = told[request.request_id]
        assert progress.num_cached_tokens == 0
        assert progress.logprobs is not None
        check_prompt_rows(progress.logprobs.prompt, logits, tokens, 3)
        (row,) = progress.logprobs.tokens
        check_row(row, logits[len(tokens) - 1], request.tokens[-1], 2, atol=1e-4)
    logits = reference(model, neighbour.tokens)
    for place, progress in enumerate(told["neighbour"], start=9):
        assert progress.logprobs is not None
        (row,) = progress.logprobs.tokens
        # Raw logits: the bias chose the token and does not show in its probability.
        assert progress.new_tokens == (5,)
        check_row(row, logits[place - 1], 5, 0, atol=1e-4)


@torch.inference_mode()
def reference(model: Any, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def test_logits_held_for_prompts_are_bounded(make_model: Callable[[str], Path]) -> None:
    """However many prompts ask and whatever the budget is."""
    engine = build(make_model("llama"), max_num_batched_tokens=4 * MAX_PROMPT_LOGITS)
    rows: list[int] = []
    runner: Any = engine._runner
    run_plan = runner.run

    def watch(plan: Any, *args: Any) -> Tensor:
        logits: Tensor = run_plan(plan)
        rows.append(logits.shape[0])
        return logits

    runner.run = watch
    for index in range(4):
        add(engine, f"r{index}", [index + 3] * 100, prompt_logprobs=1, prefill_only=True)
    told = run(engine)
    assert sorted(told) == ["r0", "r1", "r2", "r3"]
    assert sum(rows) == 400
    assert max(rows) == MAX_PROMPT_LOGITS
    for progress in told.values():
        assert progress[0].logprobs is not None
        assert len(progress[0].logprobs.prompt) == 99
