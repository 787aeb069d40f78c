"""Makes a loaded transformers model faster, and proves that it computes the same.

A model of Llama's form (by its modules' names and types) becomes a FusedDecoder, layer by layer, so
that only one layer's weights exist twice at a time. Each layer must give what the original gives on
random input, and the whole model the same logits, or the model stays as transformers wrote it. What
is not of that form keeps its modules; only their linears are packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionBatch, AttentionCall
from engine.fused_decoder import FusedAttention, FusedDecoder, FusedLayer, FusedMLP, Norm
from engine.kv_store import KVStore
from engine.packed_linear import PackedLinear, can_pack, linear, merged
from engine.process_memory import MappedFiles
from kernels.ops import HeadNorms, LayerOps
from kernels.paged_attention import RequestRows
from wire.layout import KVLayout

log = logging.getLogger(__name__)

NUM_PROOF_ROWS = 37
PROOF_BLOCK_SIZE = 8
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative, of a layer: rounding of another order of additions."""
WHOLE_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Of all layers together."""


@dataclass(frozen=True, slots=True)
class Fusions:
    """What was done to a model; `baton doctor` shows it."""

    decoder: bool  # of Llama's form: runs on Baton's own operations
    packed_linears: int
    reason: str = ""  # why it is not a fused decoder

    def __str__(self) -> str:
        packed = f"{self.packed_linears} packed linears"
        return f"fused decoder, {packed}" if self.decoder else f"{packed}; {self.reason}"


class _OtherForm(Exception):
    """The model is not of the form; the text says where."""


def fuse(
    model: Any,
    calls: tuple[AttentionCall, ...],
    layout: KVLayout,
    ops: LayerOps,
    files: MappedFiles,
) -> tuple[Any, Fusions]:
    """A faster model with equal results, and what was done.

    Args:
        calls: how each layer calls its attention, as the probe saw it.
        layout: of a KV block of any size.
        files: where the model's weights may lie; those that were packed are given up there.
    """
    proof = _Proof(model, layout, ops)
    try:
        parts = _parts(model, calls)
        before = proof.logits(model)
        layers = [
            _replaced(parts.layers, index, call, layout, proof, files)
            for index, call in enumerate(calls)
        ]
    except _OtherForm as other:
        return model, Fusions(False, pack_linears(model, files), str(other))
    decoder = FusedDecoder(
        embedding=parts.embedding,
        rotary=parts.rotary,
        layers=layers,
        norm=_norm(parts.norm),
        head=linear(parts.head.weight, parts.head.bias),
    )
    if parts.head.weight is not parts.embedding.weight:
        files.give_up([parts.head.weight])
    difference = _difference(before, proof.logits(decoder))
    if difference < WHOLE_TOLERANCE[before.dtype]:
        return decoder.eval(), Fusions(True, 4 * len(layers) + 1)
    reason = f"something outside its layers differs (by {difference:.1e})"
    return model, Fusions(False, 4 * len(layers) + pack_linears(model, files), reason)


def pack_linears(module: nn.Module, files: MappedFiles) -> int:
    """Replace every linear below `module` that can be packed; how many those were."""
    count = 0
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child.weight.detach(), child.bias))
            files.give_up([child.weight])
            count += 1
        else:
            count += pack_linears(child, files)
    return count


# ---------------------------------------------------------------- the form


@dataclass(frozen=True, slots=True)
class _Parts:
    embedding: nn.Embedding
    rotary: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear


def _parts(model: Any, calls: tuple[AttentionCall, ...]) -> _Parts:
    base = _child(model, "model", nn.Module)
    parts = _Parts(
        _child(base, "embed_tokens", nn.Embedding),
        _child(base, "rotary_emb", nn.Module),
        _child(base, "layers", nn.ModuleList),
        _child(base, "norm", nn.Module),
        _child(model, "lm_head", nn.Linear),
    )
    _only(base, "embed_tokens", "rotary_emb", "layers", "norm")
    if len(parts.layers) != len(calls):
        raise _OtherForm(f"{len(parts.layers)} layers, {len(calls)} of them attend")
    return parts


def _fused_layer(layer: nn.Module, index: int, call: AttentionCall, layout: KVLayout) -> FusedLayer:
    _only(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    return FusedLayer(
        index=index,
        input_norm=_norm(_child(layer, "input_layernorm", nn.Module)),
        attention=_fused_attention(_child(layer, "self_attn", nn.Module), call, layout),
        post_attention_norm=_norm(_child(layer, "post_attention_layernorm", nn.Module)),
        mlp=_fused_mlp(_child(layer, "mlp", nn.Module)),
    )


def _fused_mlp(module: nn.Module) -> FusedMLP:
    """Which activation it has, the proof tells."""
    merged_already = hasattr(module, "gate_up_proj")  # Phi-3
    inputs = ("gate_up_proj",) if merged_already else ("gate_proj", "up_proj")
    _only(module, *inputs, "down_proj", "act_fn", "activation_fn")
    down = _child(module, "down_proj", nn.Linear)
    return FusedMLP(
        merged([_child(module, name, nn.Linear) for name in inputs]),
        linear(down.weight.detach(), down.bias),
    )


def _fused_attention(module: nn.Module, call: AttentionCall, layout: KVLayout) -> FusedAttention:
    inputs = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
    _only(module, *inputs, "o_proj", "q_norm", "k_norm")
    if call.softcap is not None or call.has_sinks:
        raise _OtherForm("its attention has a soft cap or sinks")
    qkv = merged([_child(module, name, nn.Linear) for name in inputs])
    output = _child(module, "o_proj", nn.Linear)
    return FusedAttention(
        qkv=qkv,
        output=linear(output.weight.detach(), output.bias),
        num_query_heads=qkv.out_features // layout.head_dim - 2 * layout.num_kv_heads,
        head_dim=layout.head_dim,
        scale=call.scale,
        window=call.window,
        head_norms=_head_norms(module),
    )


def _head_norms(module: nn.Module) -> HeadNorms | None:
    if not hasattr(module, "q_norm"):
        return None
    query, key = (_norm(_child(module, name, nn.Module)) for name in ("q_norm", "k_norm"))
    if query.eps != key.eps:
        raise _OtherForm("the norms of queries and keys differ")
    return HeadNorms(query.weight, key.weight, query.eps)


def _norm(module: nn.Module) -> Norm:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or hasattr(module, "bias"):
        raise _OtherForm(f"{type(module).__name__} is no RMS norm")
    return Norm(weight.detach(), eps)


def _child(parent: Any, name: str, kind: type[Any]) -> Any:
    child = getattr(parent, name, None)
    if not isinstance(child, kind):
        raise _OtherForm(f"no {kind.__name__} {name} in {type(parent).__name__}")
    return child


def _only(module: nn.Module, *names: str) -> None:
    """Refuse a module with other children; dropout does nothing here."""
    children = module.named_children()
    strange = {name for name, child in children if not isinstance(child, nn.Dropout)} - set(names)
    if strange:
        raise _OtherForm(f"{type(module).__name__} has {', '.join(sorted(strange))}")


# ---------------------------------------------------------------- the proof


def _replaced(
    layers: nn.ModuleList,
    index: int,
    call: AttentionCall,
    layout: KVLayout,
    proof: _Proof,
    files: MappedFiles,
) -> FusedLayer:
    """The fused form of one layer, proven; the original's weights are given up."""
    original = layers[index]
    fused = _fused_layer(original, index, call, layout)
    difference = proof.difference(original, fused)
    if not difference < proof.tolerance:
        raise _OtherForm(f"layer {index} computes something else (by {difference:.1e})")
    layers[index] = _Run(fused)
    files.give_up(original.parameters())
    return fused


class _Run(nn.Module):
    """A fused layer with the call of the one that it replaces."""

    def __init__(self, layer: FusedLayer) -> None:
        super().__init__()
        self._layer = layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_batch: AttentionBatch,
        **_: Any,
    ) -> Tensor:
        cos, sin = (x.squeeze(0).contiguous() for x in position_embeddings)
        residual = hidden_states.squeeze(0).clone()
        ops = attention_batch.ops
        branch = self._layer(ops, residual, None, (cos, sin), attention_batch)
        return (residual + branch).unsqueeze(0)


class _Proof:
    """Runs a layer or a model on a request of a few rows, with a context of its own."""

    def __init__(self, model: Any, layout: KVLayout, ops: LayerOps) -> None:
        self._model = model
        self._layout = layout
        self._ops = ops
        self._positions = torch.arange(NUM_PROOF_ROWS, device=model.device).unsqueeze(0)
        self.tolerance = TOLERANCE[model.dtype]

    @torch.inference_mode()
    def difference(self, original: nn.Module, fused: FusedLayer) -> float:
        hidden = self._random_hidden()
        turn = self._model.model.rotary_emb(hidden, self._positions)
        run: Callable[[nn.Module], Tensor] = lambda layer: layer(  # noqa: E731
            hidden,
            attention_mask=None,
            position_embeddings=turn,
            position_ids=self._positions,
            past_key_values=None,
            use_cache=False,
            attention_batch=self._batch(),
        )
        return _difference(run(original), run(_Run(fused)))

    @torch.inference_mode()
    def logits(self, model: Any) -> Tensor:
        vocabulary = self._model.get_input_embeddings().num_embeddings
        tokens = (self._positions * 7 + 3) % vocabulary
        output = model(
            input_ids=tokens,
            position_ids=self._positions,
            use_cache=False,
            attention_batch=self._batch(),
        )
        logits: Tensor = output.logits
        return logits

    def _random_hidden(self) -> Tensor:
        embedding = self._model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        shape = (1, NUM_PROOF_ROWS, embedding.shape[1])
        return torch.randn(shape, generator=generator).to(embedding)

    def _batch(self) -> AttentionBatch:
        num_blocks = self._layout.num_blocks(NUM_PROOF_ROWS)
        device = self._positions.device
        table = torch.arange(num_blocks, device=device).flip(0)
        rows = RequestRows(0, NUM_PROOF_ROWS, NUM_PROOF_ROWS, table)
        positions = self._positions.squeeze(0)
        size = self._layout.block_size
        return AttentionBatch(
            KVStore(self._layout, num_blocks, device),
            (rows,),
            (table[positions // size], positions % size),
            self._ops,
        )


def _difference(expected: Tensor, found: Tensor) -> float:
    """Relative, over the whole; NaN where either is not finite."""
    expected, found = expected.double(), found.double()
    return float((expected - found).norm() / expected.norm())
