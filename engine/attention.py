"""Baton's attention inside a transformers model: write keys and values into blocks, then attend.

transformers calls the registered function once per layer. The step's metadata is a keyword argument
of the model's forward pass, which hands it down to every layer; nothing is global.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from engine.kv_store import KVStore, SlotMapping
from kernels.device_rows import DeviceRows
from kernels.ops import LayerOps, PackedRows, TorchOps
from kernels.paged_attention import RequestRows

PAGED = "baton_paged"
"""Name under which transformers knows the attention; no mask is registered, so none is built."""


@dataclass(frozen=True)
class AttentionBatch:
    """Where the rows of one forward pass belong, and where their keys and values go."""

    store: KVStore
    requests: Sequence[RequestRows]
    slot_mapping: SlotMapping
    ops: LayerOps = field(default_factory=TorchOps)
    on_layer: Callable[[int], None] | None = None  # is told which layer has written its KV
    laid_out: DeviceRows | None = None  # the requests as kernels of a GPU read them

    @cached_property
    def rows(self) -> PackedRows:
        """The requests as all layers read them."""
        return PackedRows(self.requests, laid_out=self.laid_out)


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How one layer calls its attention, besides queries, keys and values."""

    scale: float
    window: int | None
    softcap: float | None
    has_sinks: bool


class MissingBatch(RuntimeError):
    """The model did not hand the step's metadata to its attention."""


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,  # [1, Hq, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,  # [1, Hkv, T, D]
    attention_mask: object,
    *,
    attention_batch: AttentionBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,  # the probe has refused what would matter
) -> tuple[Tensor, None]:
    """transformers' attention interface: output [1, T, Hq, D] and no weights."""
    if attention_batch is None:
        raise MissingBatch(type(module).__name__)
    layer: Any = getattr(module, "layer_idx", None)
    store = attention_batch.store
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [T, H, D]
    store.write(layer, attention_batch.slot_mapping, rows[1], rows[2])
    if attention_batch.on_layer is not None:
        attention_batch.on_layer(layer)
    output = attention_batch.ops.attention(
        rows[0].contiguous(),
        store.keys(layer),
        store.values(layer),
        attention_batch.rows,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.unsqueeze(0), None
