"""Beam searches through the paged engine give transformers' sequences and scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from tests.engine.test_beam_search import EARLY, PAD
from wire.types import BeamParams, EarlyStopping, Hypothesis, SamplingParams

PROMPT = [5, 17, 31, 40, 8, 77, 12]
NUM_BLOCKS = 96
MAX_TOKENS = 12
CASES = [
    BeamParams(4, 1.0, EarlyStopping.HEURISTIC),
    BeamParams(3, 2.0, EarlyStopping.NEVER),
    BeamParams(2, -0.5, EarlyStopping.WHEN_FULL),
]


def searched(
    loaded: LoadedModel, eos: int, cases: list[BeamParams], beside: bool = True
) -> list[tuple[Hypothesis, ...]]:
    """All at once, in small chunks; `beside` a request that is sampled."""
    store = KVStore(loaded.kv_layout(4), NUM_BLOCKS)
    store.blocks.fill_(float("nan"))  # an unwritten slot that is read shows at once
    engine = Engine(
        EngineConfig(
            block_size=4, num_blocks=NUM_BLOCKS, max_model_len=64, max_num_batched_tokens=11
        ),
        ModelRunner(loaded, store),
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset([eos]),
        ops=loaded.ops,
    )
    if beside:
        engine.add(Request("plain", [9, 9, 4], 3, SamplingParams(max_tokens=30), 64))
    for number, params in enumerate(cases):
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, beam=params)
        engine.add(Request(str(number), list(PROMPT), len(PROMPT), sampling, 64))
    found: dict[str, tuple[Hypothesis, ...]] = {}
    while engine.has_work():
        result = engine.step()
        engine.check_integrity()
        for progress in result.progress if result is not None else ():
            if progress.hypotheses:
                found[progress.request_id] = progress.hypotheses
    return [found[str(number)] for number in range(len(cases))]


def reference(model: Any, eos: int, params: BeamParams) -> Any:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        return model.generate(
            torch.tensor([PROMPT]),
            num_beams=params.width,
            num_return_sequences=params.width,
            length_penalty=params.length_penalty,
            early_stopping=EARLY[params.early_stopping],
            eos_token_id=eos,
            pad_token_id=PAD,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "qwen3_moe"])
def test_sequences_and_scores(name: str, make_model: Callable[[str], Path]) -> None:
    folder = make_model(name)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.inference_mode():  # a token that beams run into
        eos = int(model(torch.tensor([[*PROMPT, 50]])).logits[0, -1].topk(3).indices[2])
    for params, found in zip(CASES, searched(load_model(folder), eos, CASES), strict=True):
        theirs = reference(model, eos, params)
        for hypothesis, tokens, score in zip(
            found, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True
        ):
            assert tokens[len(PROMPT) :][: len(hypothesis.tokens)] == list(hypothesis.tokens)
            assert hypothesis.score == pytest.approx(score, abs=2e-4)


def test_what_shares_its_steps_changes_no_bit_of_a_search(
    make_model: Callable[[str], Path],
) -> None:
    loaded = load_model(make_model("llama"))
    if loaded.not_deterministic:
        pytest.skip(loaded.not_deterministic)
    together = searched(loaded, 2, CASES)
    assert [searched(loaded, 2, [params], beside=False)[0] for params in CASES] == together
