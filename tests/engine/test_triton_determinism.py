"""`--deterministic` as a GPU has it: Triton's kernels for attention, norms and products.

In the interpreter, where there is no GPU: what is shown is that a row's numbers are added in one
order whatever shares its step, not how a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import loader
from engine.config import EngineConfig
from engine.determinism import why_not_deterministic
from engine.engine import Engine
from engine.graphs import EagerCapture, ladder
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.packed_linear import Linears, PlainLinear
from engine.request import Request
from engine.runner import ModelRunner
from kernels import attention_tiling, triton_matmul
from kernels.ops import LayerOps
from kernels.triton_ops import TritonOps
from tests.engine.watch import Watch
from wire.types import SamplingParams

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton does not run on this CPU's tensors"
)
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, MAX_TOKENS = 8, 40, 64, 2
PROMPTS = [[(7 * i + 5 * n + 1) % 90 for i in range(length)] for n, length in enumerate((45, 3, 9))]


@pytest.fixture(scope="module")
def loaded(make_model: Callable[[str], Path]) -> LoadedModel:
    """As the loader makes one for a GPU."""
    ops = TritonOps(invariant=True, warn=pytest.fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "_choose_ops", lambda *_, **__: ops)
        patch.setattr(Linears, "can_pack", lambda *_: False)
        loaded = load_model(make_model("llama"), dtype="float32", max_model_len=MAX_LEN)
    loader._make_invariant(loaded.model)
    assert all(isinstance(x, PlainLinear) and x.is_invariant for x in loaded.model.linears())
    return replace(loaded, ops=ops)


def logits_of(
    loaded: LoadedModel, names: list[str], *, chunk: int, graphs: bool
) -> dict[tuple[str, int], Tensor]:
    """Of the prompts with these names, all asked at once."""
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS + 1)
    runner = ModelRunner(loaded, store, packed=True)
    if graphs:
        runner.capture(ladder(8), MAX_LEN, EagerCapture(), scratch=NUM_BLOCKS)
    watch = Watch(runner)
    engine = Engine(
        EngineConfig(BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, 8, 64, long_prefill_token_threshold=chunk),
        watch,
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(),
        ops=loaded.ops,
    )
    for name in names:
        prompt = PROMPTS[int(name)]
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
        engine.add(Request(name, list(prompt), len(prompt), sampling, MAX_LEN))
    while engine.has_work():
        engine.step()
    return watch.logits


def test_bits_do_not_depend_on_company_chunks_or_the_padding_of_graphs(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With contexts and sums that would be split if that were allowed."""
    monkeypatch.setattr(attention_tiling, "KEYS_PER_SPLIT", 16)
    monkeypatch.setattr(attention_tiling, "PROGRAMS_PER_PROCESSOR", 100)
    monkeypatch.setattr(triton_matmul, "MIN_STEPS", 1)
    alone: dict[tuple[str, int], Tensor] = {}
    for name in ("0", "1", "2"):
        alone |= logits_of(loaded, [name], chunk=64, graphs=False)
    together = logits_of(loaded, ["2", "0", "1"], chunk=13, graphs=True)
    assert len(alone) == 3 * MAX_TOKENS
    assert together.keys() == alone.keys()
    for key, row in alone.items():
        assert torch.equal(together[key], row), key


def test_a_model_is_called_deterministic_only_with_such_kernels(loaded: LoadedModel) -> None:
    def why(ops: LayerOps) -> str:
        return why_not_deterministic(
            loaded.model, ops, head_dim=loaded.head_dim, num_kv_heads=loaded.num_kv_heads
        )

    assert why(loaded.ops) == ""
    assert "depends on the number of rows" in why(TritonOps())
