"""Which models are fused, that a wrong fusion is noticed, and that the bits do not move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention import AttentionBatch
from engine.fused_decoder import FusedDecoder
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.packed_linear import CompiledLinear, Linears, MklLinear
from kernels.cpu_ops import load_cpu_ops
from kernels.ops import LayerOps, TorchOps
from kernels.paged_attention import RequestRows

MakeModel = Callable[[str], Path]
FUSED = ["llama", "llama_tied", "llama_dynamic", "llama_yarn", "qwen2", "qwen3", "mistral", "phi3"]
NOT_FUSED = ["gemma2", "gpt2", "opt", "mixtral", "gpt_oss"]
BLOCK_SIZE = 16
OPS = load_cpu_ops() or TorchOps()

needs_packing = pytest.mark.skipif(
    not Linears(OPS).can_pack(torch.zeros(1, 1)), reason="nothing here packs weights"
)


@pytest.mark.parametrize("name", FUSED)
def test_models_of_llamas_form_are_fused(make_model: MakeModel, name: str) -> None:
    loaded = load_model(make_model(name), dtype="float32")
    assert loaded.fusions.decoder, loaded.fusions.reason
    assert isinstance(loaded.model, FusedDecoder)


@needs_packing
@pytest.mark.parametrize("name", NOT_FUSED)
def test_other_models_have_their_linears_packed(make_model: MakeModel, name: str) -> None:
    loaded = load_model(make_model(name), dtype="float32")
    assert not loaded.fusions.decoder
    assert loaded.fusions.reason
    packed = [m for m in loaded.model.modules() if isinstance(m, CompiledLinear | MklLinear)]
    assert len(packed) + 2 * loaded.fusions.gated_mlps == loaded.fusions.packed_linears > 0


def test_fusing_can_be_switched_off(make_model: MakeModel) -> None:
    loaded = load_model(make_model("llama"), dtype="float32", fusing=False)
    assert "switched off" in str(loaded.fusions)
    assert type(loaded.model).__name__ == "LlamaForCausalLM"


def test_a_layer_that_computes_something_else_is_left_alone(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: 1.001 * original(self, x)
    )
    loaded = load_model(make_model("llama"), dtype="float32")
    assert not loaded.fusions.decoder
    assert "computes something else" in loaded.fusions.reason


def test_a_difference_outside_the_layers_keeps_the_model_around_them(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaModel.forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", scaled)
    folder = make_model("llama")
    loaded = load_model(folder, dtype="float32")
    assert not loaded.fusions.decoder
    assert "outside its layers" in loaded.fusions.reason
    untouched = load_model(folder, dtype="float32", fusing=False)
    torch.testing.assert_close(logits(loaded, [20]), logits(untouched, [20]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("ops", [OPS, TorchOps()], ids=lambda ops: ops.name)
def test_packed_linears_give_each_row_the_same_bits(ops: LayerOps) -> None:
    generator = torch.Generator().manual_seed(0)
    if not Linears(ops).can_pack(torch.zeros(1, 1)):
        pytest.skip("nothing here packs weights")
    for size in ((96, 64), (100, 36), (512, 192)):
        weight = torch.randn(size, generator=generator)
        layer = Linears(ops).linear(weight, torch.randn(size[0], generator=generator))
        x = torch.randn(300, size[1], generator=generator)
        whole = layer(x)
        for rows in (1, 2, 3, 5, 6, 7, 8, 12, 13, 16, 31, 64, 255, 256, 257):
            assert torch.equal(layer(x[:rows].contiguous()), whole[:rows]), rows
        assert layer(x[:0]).shape == (0, size[0])


@needs_packing
@pytest.mark.parametrize("chunk", [1, 3, 17, 64, 256])
def test_logits_have_the_same_bits_in_every_chunk_and_batch(
    make_model: MakeModel, chunk: int
) -> None:
    """32 requests whose chunks share their passes, against each alone in one piece."""
    loaded = load_model(make_model("qwen3"), dtype="float32")
    lengths = [1 + (37 * i) % 60 for i in range(32)] if chunk < 64 else [100, 60, 7]
    together = logits(loaded, lengths, chunk)
    for number, length in enumerate(lengths):
        alone = logits(loaded, [length], first=number)
        assert torch.equal(together[number], alone[0]), f"request {number} of {length} tokens"


@torch.inference_mode()
def logits(
    loaded: LoadedModel, lengths: list[int], chunk: int | None = None, first: int = 0
) -> Tensor:
    """Logits [requests, vocabulary] of each request's last token, all of them in shared passes."""
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), 8 * len(lengths))
    done = [0] * len(lengths)
    found: dict[int, Tensor] = {}
    while len(found) < len(lengths):
        rows: list[RequestRows] = []
        tokens: list[int] = []
        positions: list[int] = []
        tables, ends = [], []
        for number, length in enumerate(lengths):
            start, end = done[number], min(length, done[number] + (chunk or length))
            if start == end:
                continue
            table = torch.arange(8 * number, 8 * number + 8)
            rows.append(RequestRows(len(tokens), end - start, end, table))
            tokens += [((first + number) * 13 + p * 7) % 97 for p in range(start, end)]
            positions += range(start, end)
            tables += [table[p // BLOCK_SIZE] for p in range(start, end)]
            ends.append((number, len(tokens) - 1, end == length))
            done[number] = end
        places = torch.tensor(positions)
        batch = AttentionBatch(
            store, tuple(rows), (torch.stack(tables), places % BLOCK_SIZE), loaded.ops
        )
        output = loaded.model(
            input_ids=torch.tensor([tokens]),
            position_ids=places.unsqueeze(0),
            use_cache=False,
            logits_to_keep=torch.tensor([row for _, row, _ in ends]),
            attention_batch=batch,
        )
        for (number, _, last), row in zip(ends, output.logits[0], strict=True):
            if last:
                found[number] = row
    return torch.stack([found[number] for number in range(len(lengths))])


def test_layers_are_told_in_order(make_model: MakeModel) -> None:
    """What the handoff sends while a step still computes."""
    loaded = load_model(make_model("llama"), dtype="float32")
    told: list[int] = []
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), 1)
    table = torch.tensor([0])
    batch = AttentionBatch(
        store,
        (RequestRows(0, 2, 2, table),),
        (torch.zeros(2, dtype=torch.int64), torch.arange(2)),
        loaded.ops,
        told.append,
    )
    with torch.inference_mode():
        loaded.model(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), batch)
    assert told == [0, 1]
