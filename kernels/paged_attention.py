"""Paged causal attention: the plain torch reference, the specification of every faster one.

Keys and values lie in blocks of `block_size` slots. A request's block table names its blocks in
order, so the key of position p is `keys[block_table[p // block_size], p % block_size]`:

    positions      0 ............ first ............. context_len
    keys           ◄──── computed earlier ────►◄─ this step's ─►   all are in the cache already
    query rows                                 first_row ... + num_rows

Query row i of a request stands at position `context_len - num_rows + i` and sees the keys of
positions (position - window, position]. Requests never see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RequestRows:
    """One request's rows [first_row, first_row + num_rows) of the flat batch, and its context."""

    first_row: int
    num_rows: int
    context_len: int  # tokens whose keys are in the cache, this step's included
    block_table: Tensor  # int64, at least ceil(context_len / block_size) entries

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_rows)

    @property
    def first_position(self) -> int:
        return self.context_len - self.num_rows


def paged_attention_reference(
    query: Tensor,  # [T, Hq, D]
    keys: Tensor,  # [num_blocks, block_size, Hkv, D]
    values: Tensor,  # [num_blocks, block_size, Hkv, D]
    requests: Sequence[RequestRows],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
) -> Tensor:
    """Attention output [T, Hq, D], computed in fp32 and returned in the query's dtype.

    `softcap` bounds the scores by c * tanh(score / c) (Gemma 2). `sinks` adds to each head's
    softmax one more score without a value (GPT-OSS).
    """
    output = torch.empty_like(query)
    for request in requests:
        k, v = (_context(cache, request).float() for cache in (keys, values))
        groups = query.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # [S, Hq, D]
        scores = torch.einsum("qhd,khd->hqk", query[request.rows].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = visible_keys(request.num_rows, request.context_len, window, query.device)
        weights = _softmax(scores.masked_fill(~visible, float("-inf")), sinks)
        output[request.rows] = torch.einsum("hqk,khd->qhd", weights, v).to(query.dtype)
    return output


def visible_keys(num_rows: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[num_rows, num_keys]: whether the row sees the key; the last row stands at the last key."""
    distance = (
        torch.arange(num_keys - num_rows, num_keys, device=device)[:, None]
        - torch.arange(num_keys, device=device)[None, :]
    )
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)


def _context(cache: Tensor, request: RequestRows) -> Tensor:
    """[context_len, Hkv, D]: a request's keys or values in order."""
    num_blocks = -(-request.context_len // cache.shape[1])
    return cache[request.block_table[:num_blocks]].flatten(0, 1)[: request.context_len]


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
