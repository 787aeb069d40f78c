"""The engine's runner with Triton's operations gives the tokens of plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.loader import load_model
from engine.model_info import LoadedModel
from kernels.triton_ops import TritonOps
from tests.engine.test_runner_parity import NEAR_TIE, Driver, prompt

FUSED, AS_WRITTEN = "qwen3", "gemma2"  # with norms of heads; with a window and a soft cap


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not run on this CPU's tensors")
@pytest.mark.parametrize("name", ["llama", FUSED, AS_WRITTEN])
def test_greedy_tokens_equal_transformers(name: str, make_model: Callable[[str], Path]) -> None:
    """A long prompt in chunks beside one that decodes, then both decode."""
    folder = make_model(name)
    driver = Driver(_with_triton(load_model(folder, dtype="float32")))
    a, b = driver.request("a", prompt(5, seed=3)), driver.request("b", prompt(14, seed=4))
    driver.step((a, 5), (b, 6))
    driver.step((b, 8), (a, 1))
    driver.decode(a, b, steps=3)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for request in (a, b):
        with torch.inference_mode():
            expected = plain(torch.tensor([request.tokens])).logits[0]
        expected = expected[request.num_prompt_tokens - 1 : -1]
        ours = torch.stack(driver.logits[request.request_id])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        for token, row in zip(request.output_tokens, expected, strict=True):
            assert float(row.max() - row[token]) < NEAR_TIE


def _with_triton(loaded: LoadedModel) -> LoadedModel:
    def refuse(case: str) -> None:
        pytest.fail(case)

    return replace(loaded, ops=TritonOps(warn=refuse))
