"""Whether a request's logits have the same bits whatever shares its steps, and however it is cut.

Every operation must give a row the same bits among any rows: the compiled kernels do by their fixed
order of keys, packed linears do as far as was ever seen, and are probed on this machine. What runs
as transformers wrote it uses matrix products that choose another order for other numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from engine.fused_decoder import FusedDecoder
from engine.packed_linear import CompiledLinear, Linear, MklLinear, PlainLinear
from kernels.ops import LayerOps

PROBED_ROWS = (1, 2, 3, 5, 6, 7, 8, 13, 16, 31, 64, 200)
MOST_ROWS = 256


def why_not_deterministic(
    model: nn.Module, ops: LayerOps, *, head_dim: int, num_kv_heads: int
) -> str:
    """The first reason why logits may differ in their last bits; empty if there is none."""
    if not isinstance(model, FusedDecoder):
        return "the model does not run as a fused decoder"
    num_query_heads = model.num_query_heads
    if not ops.is_batch_invariant(head_dim, num_query_heads // num_kv_heads):
        return f"attention by {ops.name} depends on the number of rows"
    return _probe_linears(model.linears())


@torch.inference_mode()
def _probe_linears(linears: Iterable[Linear]) -> str:
    """One linear of each shape, over row counts."""
    for out_features, in_features, layer in _one_of_each_shape(linears):
        x = torch.randn(MOST_ROWS, in_features, generator=torch.Generator().manual_seed(0))
        if isinstance(layer, PlainLinear) and layer.is_invariant:
            x = x.to(layer.weight)
        elif not isinstance(layer, CompiledLinear | MklLinear):
            return "its linears cannot be packed here"
        whole = layer(x)
        for rows in PROBED_ROWS:
            if not torch.equal(layer(x[:rows]), whole[:rows]):
                return f"a linear of {in_features} to {out_features} differs at {rows} rows"
    return ""


def _one_of_each_shape(linears: Iterable[Linear]) -> Iterable[tuple[int, int, Linear]]:
    found = {(layer.out_features, layer.in_features): layer for layer in linears}
    return ((*shape, layer) for shape, layer in found.items())
