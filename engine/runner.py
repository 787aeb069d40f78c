"""Runs the model on a step: one flattened row of tokens in, logits where they are needed out.

On a CPU the step's numbers are tensors of their own. On a device they are one buffer, copied once
(`engine.step_inputs`), and a step that only decodes replays a graph (`engine.graphs`). When `run`
returns there, the device may still be computing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionBatch
from engine.final_states import StateReader, call_with_states
from engine.flat_batch import FlatBatch, Ints, flatten
from engine.fused_decoder import FusedDecoder
from engine.graphs import Capture, DecodeGraphs, GraphLimits
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import StepPlan
from engine.spans import Spans, no_spans
from engine.step_inputs import (
    HostRequests,
    StepInputs,
    fill,
    host_buffer,
    put_sampled,
    sizes_of,
    with_sampled,
)
from kernels.paged_attention import RequestRows

LayersDone = Callable[[int], None]
WhenDone = Callable[[LayersDone, int], None]
"""Calls the first with the second once the device has done all that it was given until now."""


def at_once(tell: LayersDone, num_layers: int) -> None:
    """On a CPU all is done when the call that does it returns."""
    tell(num_layers)


class ModelRunner:
    """A loaded model and the KV store that it computes into.

    Args:
        packed: the step's numbers travel as one buffer, as they do on devices.
        when_done: how a layer's end is waited for.
        reader: is shown a step's states; a step that it reads replays no graph.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: KVStore,
        spans: Spans = no_spans,
        *,
        packed: bool | None = None,
        when_done: WhenDone = at_once,
        reader: StateReader | None = None,
    ) -> None:
        self._model = loaded.model
        self._vocab_size = loaded.vocab_size
        self._ops = loaded.ops
        self._store = store
        self.device = store.blocks.device
        self._spans = spans
        self._packed = self.device.type != "cpu" if packed is None else packed
        self._when_done = when_done
        self._reader = reader
        self.graphs: DecodeGraphs | None = None

    def capture(
        self, rungs: tuple[int, ...], max_model_len: int, capture: Capture, scratch: int
    ) -> None:
        """Make the graphs of decode steps; `scratch` is a block that no request has.

        Only a fused decoder launches the same whatever is in the batch.
        """
        if not isinstance(self._model, FusedDecoder) or not rungs:
            return
        limits = GraphLimits(
            max_num_seqs=max(rungs),
            max_model_len=max_model_len,
            block_size=self._store.layout.block_size,
            vocab_size=self._vocab_size,
            scratch=scratch,
        )
        graphs = DecodeGraphs(limits, self._forward_of, capture, self.device)
        graphs.capture_all(rungs)
        self.graphs = graphs

    @torch.inference_mode()
    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        """See in_flight.Runner. One forward pass; fp32 logits [needed rows, vocab]."""
        reader = self._reader
        if reader is not None and not reader.reads(plan):
            reader = None
        plain = on_hidden is None and reader is None
        with self._spans("batch"):
            self._store.copy_blocks(plan.copied_blocks)
            flat = flatten(plan, self._store.layout.block_size)
            replay = None
            if self.graphs is not None and on_layers is None and plain:
                replay = self.graphs.prepare(plan, flat, sampled)
            call = self._call(plan, flat, on_layers, sampled) if replay is None else None
        with self._spans("forward"):
            if replay is not None:
                return replay()
            assert call is not None
            output = call() if plain else self._call_for_states(call, plan, on_hidden, reader)
            logits: Tensor = output.logits.squeeze(0).float()
            return logits

    def _call(
        self,
        plan: StepPlan,
        flat: FlatBatch,
        on_layers: LayersDone | None = None,
        sampled: Tensor | None = None,
    ) -> Callable[..., Any]:
        """The forward pass, ready to be called."""
        on_layer = _LayerCount(on_layers, self._when_done) if on_layers else None
        if self._packed:
            return self._call_of(self._inputs(flat, sampled), on_layer)
        token_ids = self._tensor(flat.token_ids)
        if sampled is not None:
            token_ids = with_sampled(token_ids, sampled)
        return partial(
            self._model,
            input_ids=token_ids.unsqueeze(0),
            position_ids=self._tensor(flat.positions).unsqueeze(0),
            use_cache=False,
            logits_to_keep=self._tensor(flat.needed_rows),
            attention_batch=AttentionBatch(
                self._store,
                tuple(self._request_rows(plan, flat)),
                (self._tensor(flat.blocks), self._tensor(flat.offsets)),
                self._ops,
                on_layer=on_layer,
            ),
        )

    def _inputs(self, flat: FlatBatch, sampled: Tensor | None) -> StepInputs:
        """The step's numbers on the device, without waiting for it."""
        sizes = sizes_of(flat)
        host = host_buffer(sizes.starts[-1], self.device)
        fill(host.numpy(), sizes, flat, scratch=0)
        buffer = host.to(self.device, non_blocking=True)
        if sampled is not None:
            put_sampled(buffer, sizes, sampled)
        return StepInputs.of(
            buffer,
            sizes,
            max_rows=int(np.diff(flat.row_ends, prepend=0).max()),
            max_context=int(flat.positions.max()) + 1,
        )

    def _call_of(
        self, inputs: StepInputs, on_layer: _LayerCount | None = None
    ) -> Callable[..., Any]:
        return partial(
            self._model,
            input_ids=inputs.token_ids.unsqueeze(0),
            position_ids=inputs.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=inputs.needed_rows,
            attention_batch=AttentionBatch(
                self._store,
                HostRequests(inputs.rows),
                inputs.slots,
                self._ops,
                on_layer=on_layer,
                laid_out=inputs.rows,
            ),
        )

    def _forward_of(self, inputs: StepInputs) -> Tensor:
        logits: Tensor = self._call_of(inputs)().logits
        return logits.squeeze(0)

    def _call_for_states(
        self,
        call: Callable[..., Any],
        plan: StepPlan,
        on_hidden: Callable[[Tensor], None] | None,
        reader: StateReader | None,
    ) -> Any:
        """The forward pass, and its states for who pools them and for who drafts from them."""
        layers = reader.layers if reader is not None else ()
        pooled = None
        if on_hidden is not None:
            pooled = torch.tensor(plan.hidden_rows, device=self.device)
        rows = pooled
        if reader is not None and not layers:
            rows = torch.arange(plan.num_tokens, device=self.device)
        done = call_with_states(self._model, call, rows, layers)
        if on_hidden is not None and done.final is not None:
            on_hidden((done.final if rows is pooled else done.final[pooled]).float())
        states = done.inputs if layers else done.final
        if reader is not None and states is not None:
            reader.saw(plan, states)
        return done.output

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Callable[..., Any]:
        """The forward pass on a plan, to be called with what else the model takes."""
        return self._call(plan, flatten(plan, self._store.layout.block_size))

    def _request_rows(self, plan: StepPlan, flat: FlatBatch) -> list[RequestRows]:
        rows, first_row = [], 0
        tables, starts = self._tensor(flat.tables), flat.table_start.tolist()
        for item, begin, end in zip(plan.scheduled, starts, starts[1:], strict=False):
            rows.append(RequestRows(first_row, item.num_new_tokens, item.end, tables[begin:end]))
            first_row += item.num_new_tokens
        return rows

    def _tensor(self, numbers: Ints) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


class _LayerCount:
    """Counts the layers that are done in order; one that comes early is never reported.

    Only on a CPU is a layer's KV in memory when its call returns; elsewhere it is waited for.
    """

    def __init__(self, on_layers: LayersDone, when_done: WhenDone) -> None:
        self._on_layers = on_layers
        self._when_done = when_done
        self._num_layers = 0

    def __call__(self, layer: int) -> None:
        if layer == self._num_layers:
            self._num_layers += 1
            self._when_done(self._on_layers, self._num_layers)
