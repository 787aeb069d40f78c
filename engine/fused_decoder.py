"""A decoder of Llama's form, run by Baton's own operations.

    x += attention(norm(x));  x += mlp(norm(x))        per layer, then norm and logits

transformers' modules cost 1.4 ms of Python and small operations per layer and step; here a layer is
four linears and five operations. Which models have this form is decided and proven by
`engine.fusing`; every other runs as transformers wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionBatch
from engine.packed_linear import Linear
from kernels.ops import HeadNorms, LayerOps, LayerSlots

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm's weight and epsilon."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """Rotary attention with grouped queries."""

    qkv: Linear  # queries, keys and values of all heads, one after the other
    output: Linear
    num_query_heads: int
    head_dim: int
    scale: float
    window: int | None
    head_norms: HeadNorms | None

    def __call__(
        self,
        ops: LayerOps,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        layer: int,
        batch: AttentionBatch,
    ) -> Tensor:
        """[T, hidden] → [T, hidden]; writes this step's keys and values."""
        qkv = self.qkv(x)
        slots = LayerSlots(batch.store.keys(layer), batch.store.values(layer), *batch.slot_mapping)
        ops.rotary(qkv, *turn, slots, num_query_heads=self.num_query_heads, norms=self.head_norms)
        if batch.on_layer is not None:
            batch.on_layer(layer)
        queries = qkv[:, : self.num_query_heads * self.head_dim]
        attended = ops.attention(
            queries.unflatten(1, (self.num_query_heads, self.head_dim)),
            slots.keys,
            slots.values,
            batch.rows,
            scale=self.scale,
            window=self.window,
        )
        output: Tensor = self.output(attended.flatten(1))
        return output


@dataclass(frozen=True, slots=True)
class FusedMLP:
    """down(activation(gate(x)) * up(x))"""

    gate_up: Linear
    down: Linear
    activation: str = "silu"  # one of ACTIVATIONS

    def __call__(self, ops: LayerOps, x: Tensor) -> Tensor:
        gate = ops.silu_mul if self.activation == "silu" else ops.gelu_mul
        output: Tensor = self.down(gate(self.gate_up(x)))
        return output


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """One decoder layer."""

    index: int
    input_norm: Norm
    attention: FusedAttention
    post_attention_norm: Norm
    mlp: FusedMLP

    def __call__(
        self,
        ops: LayerOps,
        residual: Tensor,  # [T, hidden], changed in place
        branch: Tensor | None,  # what the layer before adds to it
        turn: tuple[Tensor, Tensor],
        batch: AttentionBatch,
    ) -> Tensor:
        """What this layer's MLP adds to the residual."""
        norm = self.input_norm
        x = ops.add_norm(residual, branch, norm.weight, norm.eps)
        branch = self.attention(ops, x, turn, self.index, batch)
        norm = self.post_attention_norm
        x = ops.add_norm(residual, branch, norm.weight, norm.eps)
        return self.mlp(ops, x)


class FusedDecoder(nn.Module):
    """Stands in for a transformers causal language model, with the same call."""

    def __init__(
        self,
        *,
        embedding: nn.Embedding,
        rotary: nn.Module,
        layers: list[FusedLayer],
        norm: Norm,
        head: Linear,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.rotary = rotary
        self.layers = layers
        self._norm = norm
        self.head = head

    def forward(
        self,
        input_ids: Tensor,  # [1, T]
        position_ids: Tensor,  # [1, T]
        attention_batch: AttentionBatch,
        logits_to_keep: Tensor | int = 0,  # the rows whose logits are wanted; 0: all
        use_cache: bool = False,
        hidden_to_keep: Tensor | None = None,  # the rows whose final states are wanted
        inputs_to_keep: tuple[int, ...] = (),  # the layers of which all rows' input is wanted
    ) -> Any:
        """An object whose `logits` are [1, rows, vocabulary].

        Its `hidden` are [rows, hidden size], its `inputs` [T, layers * hidden size], side by side.
        """
        assert not use_cache, "keys and values go into the blocks of the batch"
        residual = self.embedding(input_ids.squeeze(0))
        turn = self.turn(residual, position_ids)
        branch, ops = None, attention_batch.ops
        inputs: list[Tensor] = []
        for layer in self.layers:
            if layer.index in inputs_to_keep:
                inputs.append(residual.clone() if branch is None else residual + branch)
            branch = layer(ops, residual, branch, turn, attention_batch)
        hidden = None
        if hidden_to_keep is not None:
            hidden = self._final(ops, residual, branch, hidden_to_keep)
        rows = logits_to_keep if isinstance(logits_to_keep, Tensor) else None
        x = self._final(ops, residual, branch, rows)
        return SimpleNamespace(
            logits=self.head(x).unsqueeze(0),
            hidden=hidden,
            inputs=torch.cat(inputs, -1) if inputs else None,
        )

    def _final(
        self, ops: LayerOps, residual: Tensor, branch: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """The states of these rows after the final norm; without `rows` it changes `residual`."""
        if rows is not None:
            residual = residual[rows]
            branch = None if branch is None else branch[rows]
        return ops.add_norm(residual, branch, self._norm.weight, self._norm.eps)

    @property
    def num_query_heads(self) -> int:
        """The most that any layer has."""
        return max(layer.attention.num_query_heads for layer in self.layers)

    def linears(self) -> Iterator[Linear]:
        """All of the model's linears."""
        for layer in self.layers:
            yield from (layer.attention.qkv, layer.attention.output)
            yield from (layer.mlp.gate_up, layer.mlp.down)
        yield self.head

    def turn(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, R] of every row's angles."""
        cos, sin = self.rotary(x.unsqueeze(0), position_ids)
        return cos.squeeze(0).contiguous(), sin.squeeze(0).contiguous()
