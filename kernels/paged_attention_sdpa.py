"""Paged attention by gathering each request's blocks and calling torch's own attention on them.

A request is attended at its exact length, without padding: its result then depends on its
neighbours neither in value nor in rounding, and costs the same as one padded call (measured on CPU:
16 requests of 300 tokens take 1.1 ms per layer both ways). A window skips the blocks before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention import RequestRows, visible_keys

QUERY_TILE = 128
"""Rows whose scores are held at once where torch's attention cannot be used (soft cap, sinks)."""

Masks = dict[tuple[int, int, int | None], Tensor]
"""Masks already built in this step: all layers of one window share them."""


def paged_attention_sdpa(
    query: Tensor,  # [T, Hq, D]
    keys: Tensor,  # [num_blocks, block_size, Hkv, D]
    values: Tensor,  # [num_blocks, block_size, Hkv, D]
    requests: Sequence[RequestRows],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # [Hq]
    masks: Masks | None = None,
) -> Tensor:
    """Same contract as `paged_attention_reference`; `masks` is filled and reused across layers."""
    masks = {} if masks is None else masks
    output = query.new_empty(query.shape)
    for request in requests:
        k, v = _gather(keys, values, request, window)  # [1, Hkv, S, D]
        if softcap is not None or sinks is not None:
            q = query[request.rows].transpose(0, 1).unsqueeze(0)  # [1, Hq, R, D]
            attended = _attend_explicitly(q, k, v, scale, window, softcap, sinks)
            output[request.rows] = attended.squeeze(0).transpose(0, 1)
        elif request.num_rows == 1:
            output[request.first_row] = _attend_row(query[request.first_row], k, v, scale)
        else:
            q = query[request.rows].transpose(0, 1).unsqueeze(0)  # [1, Hq, R, D]
            attended = _attend(q, k, v, scale, window, masks)
            output[request.rows] = attended.squeeze(0).transpose(0, 1)
    return output


def _gather(
    keys: Tensor, values: Tensor, request: RequestRows, window: int | None
) -> tuple[Tensor, Tensor]:
    """The keys and values that any of the request's rows sees, in order: [1, Hkv, S, D] each."""
    _, block_size, heads, size = keys.shape
    first_key = 0 if window is None else max(0, request.first_position - window + 1)
    first_block, skip = divmod(first_key, block_size)
    last_block = -(-request.context_len // block_size)
    blocks = request.block_table[first_block:last_block]
    stop = request.context_len - first_block * block_size
    k = keys.index_select(0, blocks).view(1, -1, heads, size)[:, skip:stop]
    v = values.index_select(0, blocks).view(1, -1, heads, size)[:, skip:stop]
    return k.transpose(1, 2), v.transpose(1, 2)


def _attend_row(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A row [Hq, D] sees every gathered key; query heads of one K/V head take the place of rows."""
    grouped = q.view(1, k.shape[1], -1, q.shape[1])
    return F.scaled_dot_product_attention(grouped, k, v, scale=scale).view(q.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, masks: Masks
) -> Tensor:
    num_rows, num_keys = q.shape[2], k.shape[2]
    plain = num_rows == num_keys and (window is None or num_keys <= window)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if plain else _mask(num_rows, num_keys, window, q.device, masks),
        is_causal=plain,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _mask(
    num_rows: int, num_keys: int, window: int | None, device: torch.device, masks: Masks
) -> Tensor:
    key = (num_rows, num_keys, window)
    if key not in masks:
        masks[key] = visible_keys(num_rows, num_keys, window, device)
    return masks[key]


def _attend_explicitly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores in fp32, a tile of rows at a time, for what torch's attention does not offer."""
    num_rows, num_keys = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    visible = visible_keys(num_rows, num_keys, window, q.device)
    tiles = []
    for first in range(0, num_rows, QUERY_TILE):
        tile = slice(first, first + QUERY_TILE)
        scores = torch.matmul(q[:, :, tile].float(), k.transpose(-1, -2)) * scale
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(~visible[tile], float("-inf"))
        tiles.append(torch.matmul(_softmax(scores, sinks), v).to(q.dtype))
    return torch.cat(tiles, dim=2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """`scores` [1, Hq, R, S]; a sink takes part in the sum and has no value."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float()[None, :, None, None].expand(1, -1, scores.shape[2], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
