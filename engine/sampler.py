"""Draws the next token of each request from its row of logits.

Each row goes through, in this order (as in vLLM):

    min_tokens mask → logit_bias → repetition → frequency and presence penalty → grammar
        temperature 0: argmax
        else: divide by temperature → min_p → top_k → top_p → Gumbel-max

The noise is a pure function of (seed, position, token id); nothing is remembered between steps, and
a row's token does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from engine.device import is_gpu, to_device
from engine.grammar import Masks
from engine.penalties import penalize, penalizes
from engine.rows import CORRUPTED, Row
from kernels.noise import row_keys
from kernels.ops import LayerOps, TorchOps
from wire.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them overflows fp32."""


class Sampler:
    """Chooses one token per row of logits."""

    def __init__(self, eos_token_ids: frozenset[int], ops: LayerOps | None = None) -> None:
        self._eos_token_ids = eos_token_ids
        self._ops = ops or TorchOps()

    def sample(
        self, logits: Tensor, requests: Sequence[Row], masks: Masks | None = None
    ) -> list[int]:
        """One token per row, for logits fp32 [R, V] with row r belonging to requests[r].

        CORRUPTED for a row that has a NaN, an infinite maximum, or a grammar that failed behind a
        draft token; the others are not concerned. Raises GrammarError where a grammar takes too
        much.
        """
        return [int(token) for token in self.draw(logits, requests, masks).tolist()]

    def draw(self, logits: Tensor, requests: Sequence[Row], masks: Masks | None = None) -> Tensor:
        """What `sample` gives, int64 [R], where the logits are: nothing waits for the device."""
        if not requests:
            return torch.zeros(0, dtype=torch.int64, device=logits.device)
        sound = finite_rows(logits)
        if is_gpu(logits.device) or not sound.all():  # asking a GPU costs more than doing it
            logits = logits.where(sound.unsqueeze(1), 0.0)
        logits = self._adjust(logits, requests, masks)
        if masks is not None:
            sound &= logits.amax(-1) > -torch.inf
        tokens = logits.argmax(-1)
        drawn = [i for i, r in enumerate(requests) if r.sampling.temperature >= GREEDY_BELOW]
        if len(drawn) == len(requests):
            tokens = _draw(logits, requests, self._ops)
        elif drawn:
            rows = to_device(drawn, torch.int64, logits.device)
            tokens[rows] = _draw(logits[rows], [requests[i] for i in drawn], self._ops)
        return tokens.where(sound, CORRUPTED)

    def _adjust(self, logits: Tensor, requests: Sequence[Row], masks: Masks | None) -> Tensor:
        """The logits with masks, biases and penalties applied; a copy if there are any."""
        touched = [i for i, r in enumerate(requests) if _adjusts(r)]
        if touched or masks is not None:
            logits = logits.clone()
        for i in touched:
            self._adjust_row(logits[i], requests[i])
        if touched:
            penalize(logits, requests, self._ops)
        if masks is not None:
            masks.apply(logits)
        return logits

    def _adjust_row(self, row: Tensor, request: Row) -> None:
        sampling = request.sampling
        if request.num_output_tokens < sampling.min_tokens:
            stops = _known(self._eos_token_ids | set(sampling.stop_token_ids), row)
            row.index_fill_(0, to_device(stops, torch.int64, row.device), -torch.inf)
        if sampling.logit_bias:
            ids = _known(sampling.logit_bias, row)
            biases = to_device([sampling.logit_bias[i] for i in ids], row.dtype, row.device)
            row.index_add_(0, to_device(ids, torch.int64, row.device), biases)


def finite_rows(logits: Tensor) -> Tensor:
    """Whether each row can be sampled from, bool [R]: masked entries may be minus infinity."""
    return logits.amax(-1).isfinite()  # a NaN anywhere in the row is its maximum


def _adjusts(request: Row) -> bool:
    sampling = request.sampling
    return bool(
        request.num_output_tokens < sampling.min_tokens
        or sampling.logit_bias
        or penalizes(sampling)
    )


def _known(ids: Collection[int], row: Tensor) -> list[int]:
    """Those of the vocabulary, sorted; one beyond it can never be sampled."""
    return sorted(i for i in ids if i < row.shape[-1])


def _draw(logits: Tensor, requests: Sequence[Row], ops: LayerOps) -> Tensor:
    """Sampled tokens, int64 [R], of rows with a temperature."""
    params = [r.sampling for r in requests]
    device = logits.device
    x = logits / to_device([p.temperature for p in params], torch.float32, device).unsqueeze(1)
    seeds = to_device([_as_int64(p.seed) for p in params], torch.int64, device)
    positions = to_device([r.num_tokens for r in requests], torch.int64, device)
    return ops.gumbel_argmax(x, _floors(x, params, ops), row_keys(seeds, positions))


def _floors(x: Tensor, params: Sequence[SamplingParams], ops: LayerOps) -> Tensor:
    return ops.filter_floor(
        x,
        to_device([p.top_k for p in params], torch.int64, x.device),
        to_device([p.top_p for p in params], torch.float64, x.device),
        to_device([p.min_p for p in params], torch.float64, x.device),
    )


def _as_int64(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed
