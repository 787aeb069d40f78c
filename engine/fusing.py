"""Makes a loaded transformers model faster, and proves that it computes the same.

A model of Llama's form (by its modules' names and types) becomes a FusedDecoder, layer by layer, so
that only one layer's weights exist twice at a time. Each layer must give what the original gives on
random input, and the whole model the same logits, or the model stays as transformers wrote it. What
is not of that form keeps its layers; those of its modules that are known become faster ones.

Where weights are rounded, each layer is proven before that, and what is outside of the layers
with the rounded ones inside: what rounding does to the logits is not for the proof to judge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from engine.attention import AttentionCall
from engine.fused_decoder import FusedAttention, FusedDecoder, FusedLayer, Norm
from engine.fused_modules import Fusions, ModuleFuser, OtherForm, child, gated_mlp, only, rms_norm
from engine.fusing_proof import TOLERANCE, WHOLE_TOLERANCE, FusedModule, Proof, relative_difference
from engine.packed_linear import Linear, Linears, PlainLinear
from engine.process_memory import MappedFiles
from kernels.ops import HeadNorms, LayerOps
from wire.layout import KVLayout


def fuse(
    model: Any,
    calls: tuple[AttentionCall, ...],
    layout: KVLayout,
    ops: LayerOps,
    linears: Linears,
    files: MappedFiles,
) -> tuple[Any, Fusions]:
    """A faster model with equal results, and what was done.

    Args:
        calls: how each layer calls its attention, as the probe saw it.
        layout: of a KV block of any size.
        files: where the model's weights may lie; those that were packed are given up there.
    """
    fuser = ModuleFuser(ops, linears, files)
    proof = Proof(model, layout, ops)
    try:
        parts = _Parts.of(model, calls)
        before = proof.logits(model)
        layers = _LayerFuser(parts.layers, layout, ops, linears, proof, files).fuse(calls)
        norm = rms_norm(parts.norm, ops)
    except OtherForm as other:
        return model, fuser.fuse(model, str(other))
    head = linears.linear(parts.head.weight.detach(), parts.head.bias)
    decoder = parts.decoder(layers, norm, head)
    if linears.rounds:
        before = proof.logits(model)  # its layers are the rounded ones by now
        plain = PlainLinear(parts.head.weight, parts.head.bias)
        proven = proof.logits(parts.decoder(layers, norm, plain))
    else:
        proven = proof.logits(decoder)
    difference = relative_difference(before, proven)
    if not difference < WHOLE_TOLERANCE[before.dtype]:
        rest = fuser.fuse(model, f"something outside its layers differs (by {difference:.1e})")
        return model, replace(rest, packed_linears=rest.packed_linears + 4 * len(layers))
    if parts.head.weight is not parts.embedding.weight:
        files.give_up([parts.head.weight])
    packed = sum(not isinstance(linear, PlainLinear) for linear in decoder.linears())
    return decoder.eval(), Fusions(True, packed, storage=linears.storage)


@dataclass(frozen=True, slots=True)
class _Parts:
    """A model of Llama's form."""

    embedding: nn.Embedding
    rotary: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    @classmethod
    def of(cls, model: Any, calls: tuple[AttentionCall, ...]) -> _Parts:
        """Raises OtherForm."""
        base = child(model, "model", nn.Module)
        parts = cls(
            child(base, "embed_tokens", nn.Embedding),
            child(base, "rotary_emb", nn.Module),
            child(base, "layers", nn.ModuleList),
            child(base, "norm", nn.Module),
            child(model, "lm_head", nn.Linear),
        )
        only(base, "embed_tokens", "rotary_emb", "layers", "norm")
        if len(parts.layers) != len(calls):
            raise OtherForm(f"{len(parts.layers)} layers, {len(calls)} of them attend")
        return parts

    def decoder(self, layers: list[FusedLayer], norm: Norm, head: Linear) -> FusedDecoder:
        """The same model of fused layers."""
        return FusedDecoder(
            embedding=self.embedding, rotary=self.rotary, layers=layers, norm=norm, head=head
        )


class _LayerFuser:
    """Makes layers, proves them, and puts them in place of the originals."""

    def __init__(
        self,
        layers: nn.ModuleList,
        layout: KVLayout,
        ops: LayerOps,
        linears: Linears,
        proof: Proof,
        files: MappedFiles,
    ) -> None:
        self._layers, self._layout, self._ops = layers, layout, ops
        self._linears, self._proof, self._files = linears, proof, files

    def fuse(self, calls: tuple[AttentionCall, ...]) -> list[FusedLayer]:
        """Raises OtherForm at the first layer that is another's; those before it are replaced."""
        return [self._replaced(index, call) for index, call in enumerate(calls)]

    def _replaced(self, index: int, call: AttentionCall) -> FusedLayer:
        original = self._layers[index]
        exact = self._linears.exact() if self._linears.rounds else self._linears
        fused = self._layer(original, index, call, exact)
        difference = self._proof.difference(original, fused)
        if not difference < TOLERANCE[self._proof.dtype]:
            raise OtherForm(f"layer {index} computes something else (by {difference:.1e})")
        if self._linears.rounds:
            fused = self._layer(original, index, call, self._linears)
        self._layers[index] = FusedModule(fused)
        self._files.give_up(original.parameters())
        return fused

    def _layer(
        self, layer: nn.Module, index: int, call: AttentionCall, linears: Linears
    ) -> FusedLayer:
        only(layer, "self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
        attention = child(layer, "self_attn", nn.Module)
        return FusedLayer(
            index=index,
            input_norm=rms_norm(child(layer, "input_layernorm", nn.Module), self._ops),
            attention=self._attention(attention, call, linears),
            post_attention_norm=rms_norm(
                child(layer, "post_attention_layernorm", nn.Module), self._ops
            ),
            mlp=gated_mlp(child(layer, "mlp", nn.Module), self._ops, linears),
        )

    def _attention(
        self, module: nn.Module, call: AttentionCall, linears: Linears
    ) -> FusedAttention:
        inputs = ("qkv_proj",) if hasattr(module, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        only(module, *inputs, "o_proj", "q_norm", "k_norm")
        if call.softcap is not None or call.has_sinks:
            raise OtherForm("its attention has a soft cap or sinks")
        qkv = linears.merged([child(module, name, nn.Linear) for name in inputs])
        output = child(module, "o_proj", nn.Linear)
        layout = self._layout
        return FusedAttention(
            qkv=qkv,
            output=linears.linear(output.weight.detach(), output.bias),
            num_query_heads=qkv.out_features // layout.head_dim - 2 * layout.num_kv_heads,
            head_dim=layout.head_dim,
            scale=call.scale,
            window=call.window,
            head_norms=self._head_norms(module),
        )

    def _head_norms(self, module: nn.Module) -> HeadNorms | None:
        if not hasattr(module, "q_norm"):
            return None
        names = ("q_norm", "k_norm")
        query, key = (rms_norm(child(module, name, nn.Module), self._ops) for name in names)
        if query.eps != key.eps:
            raise OtherForm("the norms of queries and keys differ")
        return HeadNorms(query.weight, key.weight, query.eps)
