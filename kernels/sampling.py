"""Token choice on scaled logits: which tokens are kept, and which kept token wins with its noise.

All filters are thresholds on the logit: the kept set of a row is {i : x_i >= floor}, ties at the
border included. So filtering and drawing are two independent steps, and a floor is mostly found
among the best few: a full sort costs 13 ms for 16 rows of 16 k entries, the top 64 cost 0.4.

No result depends on the other rows: what crosses entries is selection, or a sum over one row alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.noise import gumbel

FIRST_LOOK = 64  # tokens examined before anything wider
WIDEN = 16  # by how much the look widens where that was not enough


def filter_floor(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The lowest kept logit of each row, [R], for scaled logits x [R, V], finite in their maximum.

    The order is min-p, then top-k, then top-p on what these left, renormalized. `top_k` is int64
    with 0 for no limit; `top_p` and `min_p` are float64. -inf where nothing is filtered.
    """
    floor = torch.full(x.shape[:1], -torch.inf, device=x.device)
    rows = ((top_k > 0) | (top_p < 1) | (min_p > 0)).nonzero().squeeze(-1)
    width = min(FIRST_LOOK, x.shape[-1])
    while rows.numel():
        found, known = _floor_in_top(x[rows], width, top_k[rows], top_p[rows], min_p[rows])
        floor[rows[known]] = found[known]
        rows = rows[~known]
        width = min(width * WIDEN, x.shape[-1])
    return floor


def _floor_in_top(
    x: Tensor, width: int, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """(floor, whether the best `width` entries suffice to know it), each [R]."""
    top = x.topk(width).values
    weakest = top[:, -1]
    kth = top.gather(1, (top_k - 1).clamp(0, width - 1).unsqueeze(1)).squeeze(1)
    kth = torch.where((top_k > 0) & (top_k <= width), kth, -torch.inf)
    floor = torch.maximum(kth, (top[:, 0].double() + min_p.log()).float())
    whole = torch.full_like(weakest, width == x.shape[-1], dtype=torch.bool)
    known = whole | (top_k <= width) | (floor > weakest)

    nucleus = top_p < 1
    if nucleus.any():
        inside = whole | (floor > weakest)
        found, reached = _nucleus_floor(x, top, floor, top_p, inside)
        known &= reached | whole | ~nucleus
        floor = torch.where(nucleus & reached, torch.maximum(floor, found), floor)
    return floor, known


def _nucleus_floor(
    x: Tensor, top: Tensor, floor: Tensor, top_p: Tensor, inside: Tensor
) -> tuple[Tensor, Tensor]:
    """The logit at which the kept mass first reaches top_p, and whether `top` reaches that far."""
    best, low = top[:, :1], floor.unsqueeze(1)
    mass = torch.where(top >= low, (top - best).exp(), 0.0).cumsum(-1, dtype=torch.float64)
    total = mass[:, -1].clone()
    for row in (~inside).nonzero().squeeze(-1).tolist():  # a row alone: its sum has one order
        weights = (x[row] - best[row]).exp()
        total[row] = weights.where(x[row] >= low[row], 0.0).sum(dtype=torch.float64)
    reached = mass >= (top_p * total).unsqueeze(1)
    found = top.gather(1, reached.int().argmax(-1, keepdim=True)).squeeze(1)
    return found, reached[:, -1]


def gumbel_argmax(x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
    """argmax over kept tokens of x + gumbel(key, id), ties to the lowest id: int64 [R].

    Every entry gets noise: the hash and two logarithms cost 1.1 ms for 16 rows of 16 k entries,
    less than finding out which entries could do without.
    """
    ids = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    scores = x + gumbel(keys.unsqueeze(1), ids)
    return scores.masked_fill_(x < floor.unsqueeze(1), -torch.inf).argmax(-1)


def penalize(
    x: Tensor,  # fp32 [R, V], changed in place
    rows: Tensor,  # [N]
    ids: Tensor,  # [N], each pair of row and id at most once
    counts: Tensor,  # [N]: how often the id is in the row's output; 0 if only in its prompt
    repetition: Tensor,  # fp32 [R], 1 for none
    frequency: Tensor,  # fp32 [R]
    presence: Tensor,  # fp32 [R]
) -> None:
    """All penalties on the tokens that rows have seen: repetition (Keskar et al. 2019, section
    4.1), then frequency and presence, which count output alone (OpenAI's)."""
    logits, factor = x[rows, ids], repetition[rows]
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    used = frequency[rows] * counts + presence[rows]
    x[rows, ids] = logits - used.where(counts > 0, 0.0)
