"""Runs a model and its faster form on the same input, and tells how far apart they come out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionBatch
from engine.fused_decoder import FusedLayer
from engine.kv_store import KVStore
from kernels.ops import LayerOps
from kernels.paged_attention import RequestRows
from wire.layout import KVLayout

NUM_PROOF_ROWS = 37
PROOF_BLOCK_SIZE = 8
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative, of a layer: rounding of another order of additions."""
WHOLE_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 0.15}
"""Of all layers together."""


class FusedModule(nn.Module):
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


class Proof:
    """Runs a layer or a model on a request of a few rows, with a context of its own."""

    def __init__(self, model: Any, layout: KVLayout, ops: LayerOps) -> None:
        self._model = model
        self._layout = layout
        self._ops = ops
        self.dtype: torch.dtype = model.dtype
        self._positions = torch.arange(NUM_PROOF_ROWS, device=model.device).unsqueeze(0)

    @torch.inference_mode()
    def difference(self, original: nn.Module, fused: FusedLayer) -> float:
        """Between two forms of one layer, on random input."""
        hidden = self._random_hidden()
        turn = self._model.model.rotary_emb(hidden, self._positions)

        def run(layer: nn.Module) -> Tensor:
            output: Tensor = layer(
                hidden,
                attention_mask=None,
                position_embeddings=turn,
                position_ids=self._positions,
                past_key_values=None,
                use_cache=False,
                attention_batch=self._batch(),
            )
            return output

        return relative_difference(run(original), run(FusedModule(fused)))

    @torch.inference_mode()
    def logits(self, model: Any) -> Tensor:
        """Of a whole model."""
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


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Relative, over the whole; NaN where either is not finite."""
    expected, found = expected.double(), found.double()
    return float((expected - found).norm() / expected.norm())
