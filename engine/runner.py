"""Runs the model on a step: one flattened row of tokens in, logits where they are needed out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.attention import AttentionBatch
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from kernels.paged_attention import RequestRows


class ModelRunner:
    """A loaded model and the KV store that it computes into."""

    def __init__(self, loaded: LoadedModel, store: KVStore) -> None:
        self._model = loaded.model
        self._ops = loaded.ops
        self._store = store
        self._device = store.blocks.device

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_layers: Callable[[int], None] | None = None) -> Tensor:
        """See engine.Runner. One forward pass; fp32 logits [needed rows, vocab]."""
        needed = self._tensor(_needed_rows(plan))
        output = self._model(
            input_ids=self._tensor(_token_ids(plan)).unsqueeze(0),
            position_ids=self._tensor(_positions(plan)).unsqueeze(0),
            use_cache=False,
            logits_to_keep=needed,
            attention_batch=self._attention_batch(plan, on_layers),
        )
        logits: Tensor = output.logits
        return logits.squeeze(0).float()

    def _attention_batch(
        self, plan: StepPlan, on_layers: Callable[[int], None] | None
    ) -> AttentionBatch:
        block_size = self._store.layout.block_size
        slots = [slot for item in plan.scheduled for slot in _slots(item, block_size)]
        blocks, offsets = self._tensor([b for b, _ in slots]), self._tensor([o for _, o in slots])
        return AttentionBatch(
            self._store,
            tuple(self._request_rows(plan)),
            (blocks, offsets),
            self._ops,
            on_layer=_LayerCount(on_layers) if on_layers else None,
        )

    def _request_rows(self, plan: StepPlan) -> list[RequestRows]:
        rows, first_row = [], 0
        for item in plan.scheduled:
            num_blocks = self._store.layout.num_blocks(item.end)
            table = self._tensor(item.request.block_table[:num_blocks])
            rows.append(RequestRows(first_row, item.num_new_tokens, item.end, table))
            first_row += item.num_new_tokens
        return rows

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


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


def _token_ids(plan: StepPlan) -> list[int]:
    return [t for item in plan.scheduled for t in item.request.tokens[item.start : item.end]]


def _positions(plan: StepPlan) -> list[int]:
    return [p for item in plan.scheduled for p in range(item.start, item.end)]


def _slots(item: ScheduledRequest, block_size: int) -> list[tuple[int, int]]:
    """(block, offset) of each new token."""
    table, positions = item.request.block_table, range(item.start, item.end)
    return [(table[p // block_size], p % block_size) for p in positions]


def _needed_rows(plan: StepPlan) -> list[int]:
    """The last `num_logits` rows of each request."""
    rows: list[int] = []
    end = 0
    for item in plan.scheduled:
        end += item.num_new_tokens
        rows += range(end - item.num_logits, end)
    return rows
