"""Narrow weights: the model computes what its rounded weights say, to the bit among any rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import loader
from engine.attention import AttentionBatch
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.packed_linear import CompiledLinear, NarrowLinear
from kernels.cpu_ops import CpuOps, load_cpu_ops, open_library
from kernels.paged_attention import RequestRows
from kernels.weights import store
from wire.errors import ConfigError

MakeModel = Callable[[str], Path]
NARROW = ["bfloat16", "float16", "int8"]
BLOCK_SIZE = 16
NUM_TOKENS = 20

needs_library = pytest.mark.skipif(load_cpu_ops() is None, reason="needs the compiled kernels")


@torch.inference_mode()
def logits(loaded: LoadedModel) -> Tensor:
    """[NUM_TOKENS, vocabulary] of one request."""
    positions = torch.arange(NUM_TOKENS)
    table = torch.arange(2)
    batch = AttentionBatch(
        KVStore(loaded.kv_layout(BLOCK_SIZE), 2),
        (RequestRows(0, NUM_TOKENS, NUM_TOKENS, table),),
        (table[positions // BLOCK_SIZE], positions % BLOCK_SIZE),
        loaded.ops,
    )
    output = loaded.model(
        input_ids=(positions * 7 % 97).unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        attention_batch=batch,
    )
    found: Tensor = output.logits[0]
    return found


def with_rounded_linears(folder: Path, storage: str) -> LoadedModel:
    """As transformers wrote it, its linears' weights rounded; the embedding as it was."""
    loaded = load_model(folder, dtype="float32", fusing=False)
    for module in loaded.model.modules():
        if isinstance(module, nn.Linear):
            rounded = store(module.weight.detach(), storage).widened()
            module.weight = nn.Parameter(rounded, requires_grad=False)
    return loaded


@pytest.mark.parametrize("storage", NARROW)
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma2"])
def test_the_model_computes_with_rounded_weights(
    make_model: MakeModel, name: str, storage: str
) -> None:
    loaded = load_model(make_model(name), dtype="float32", weight_dtype=storage)
    expected = logits(with_rounded_linears(make_model(name), storage))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    assert f"+{storage}-weights" in loaded.numerics
    assert storage in str(loaded.fusions)
    exact = load_model(make_model(name), dtype="float32")
    assert "weights" not in exact.numerics
    assert not torch.equal(logits(loaded), logits(exact))


@needs_library
@pytest.mark.parametrize("storage", NARROW)
def test_narrow_weights_are_deterministic(make_model: MakeModel, storage: str) -> None:
    loaded = load_model(make_model("llama"), weight_dtype=storage, deterministic=True)
    assert loaded.dtype is torch.float32
    linears = list(loaded.model.linears())
    assert all(isinstance(linear, CompiledLinear) for linear in linears)


def test_without_the_library_they_are_widened_at_every_call(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "load_cpu_ops", lambda: None)
    loaded = load_model(make_model("llama"), weight_dtype="int8")
    assert all(isinstance(linear, NarrowLinear) for linear in loaded.model.linears())
    expected = logits(with_rounded_linears(make_model("llama"), "int8"))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-3, atol=1e-4)
    assert loaded.not_deterministic


def test_something_outside_the_rounded_layers_is_still_noticed(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaModel.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.last_hidden_state = 1.001 * output.last_hidden_state
        return output

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", scaled)
    loaded = load_model(make_model("llama"), weight_dtype="int8")
    assert "outside its layers" in loaded.fusions.reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weight_dtype": "int4"}, "not one of auto, float32"),
        ({"weight_dtype": "int8", "dtype": "bfloat16"}, "with --dtype float32"),
        ({"weight_dtype": "int8", "fusing": False}, "--no-fusing"),
    ],
)
def test_what_cannot_be_is_refused(
    make_model: MakeModel, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_model(make_model("llama"), **options)


@needs_library
def test_a_library_of_another_version_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kernels import cpu_ops

    current = load_cpu_ops()
    assert isinstance(current, CpuOps)
    path = Path(current._library._name)
    assert open_library(path) is not None
    assert f"cpu{cpu_ops.LIBRARY_VERSION}-" in current.name
    monkeypatch.setattr(cpu_ops, "LIBRARY_VERSION", cpu_ops.LIBRARY_VERSION + 1)
    assert open_library(path) is None
    [record] = caplog.records
    assert "torch does their work" in record.getMessage()
