"""Runs the model on a step: one flattened row of tokens in, logits where they are needed out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.attention import AttentionBatch
from engine.final_states import telling_states
from engine.flat_batch import FlatBatch, Ints, flatten
from engine.fused_decoder import FusedDecoder
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import StepPlan
from engine.spans import Spans, no_spans
from kernels.paged_attention import RequestRows


class ModelRunner:
    """A loaded model and the KV store that it computes into."""

    def __init__(self, loaded: LoadedModel, store: KVStore, spans: Spans = no_spans) -> None:
        self._model = loaded.model
        self._ops = loaded.ops
        self._store = store
        self._device = store.blocks.device
        self._spans = spans

    @torch.inference_mode()
    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """See engine.Runner. One forward pass; fp32 logits [needed rows, vocab]."""
        with self._spans("batch"):
            flat = flatten(plan, self._store.layout.block_size)
            call = partial(
                self._model,
                input_ids=self._tensor(flat.token_ids).unsqueeze(0),
                position_ids=self._tensor(flat.positions).unsqueeze(0),
                use_cache=False,
                logits_to_keep=self._tensor(flat.needed_rows),
                attention_batch=self._attention_batch(plan, flat, on_layers),
            )
        with self._spans("forward"):
            output = call() if on_hidden is None else self._call_for_hidden(call, plan, on_hidden)
            logits: Tensor = output.logits
            return logits.squeeze(0).float()

    def _call_for_hidden(
        self, call: Callable[..., Any], plan: StepPlan, on_hidden: Callable[[Tensor], None]
    ) -> Any:
        rows = torch.tensor(plan.hidden_rows, device=self._device)
        if isinstance(self._model, FusedDecoder):
            output = call(hidden_to_keep=rows)
            on_hidden(output.hidden.float())
            return output
        with telling_states(self._model, lambda states: on_hidden(states[rows].float())):
            return call()

    def _attention_batch(
        self, plan: StepPlan, flat: FlatBatch, on_layers: Callable[[int], None] | None
    ) -> AttentionBatch:
        return AttentionBatch(
            self._store,
            tuple(self._request_rows(plan, flat)),
            (self._tensor(flat.blocks), self._tensor(flat.offsets)),
            self._ops,
            on_layer=_LayerCount(on_layers) if on_layers else None,
        )

    def _request_rows(self, plan: StepPlan, flat: FlatBatch) -> list[RequestRows]:
        rows, first_row = [], 0
        tables, starts = self._tensor(flat.tables), flat.table_start.tolist()
        for item, begin, end in zip(plan.scheduled, starts, starts[1:], strict=False):
            rows.append(RequestRows(first_row, item.num_new_tokens, item.end, tables[begin:end]))
            first_row += item.num_new_tokens
        return rows

    def _tensor(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


class _LayerCount:
    """Counts the layers that are done in order; one that comes early is never reported.

    Only on a CPU is a layer's KV in memory when its call returns.
    """

    def __init__(self, on_layers: Callable[[int], None]) -> None:
        self._on_layers = on_layers
        self._num_layers = 0

    def __call__(self, layer: int) -> None:
        if layer == self._num_layers:
            self._num_layers += 1
            self._on_layers(self._num_layers)
