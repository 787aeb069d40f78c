"""Token choice in Triton: the floor of the filters, and the Gumbel draw with the noise of the CPU.

A floor is found without sorting: numbers are read as integers of the same order, and the range in
which the floor lies is halved with a pass over the row's logits, which lie in the cache. What the
filters keep is exact for given weights; these are sums in fp64, as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import on_its_device, power_of_2

FLOOR_TILE = 8192  # logits per step of a pass
DRAW_TILE = 2048  # logits per program
PENALTY_TILE = 256  # entries per program


@on_its_device
def filter_floor_triton(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """See `kernels.sampling.filter_floor`."""
    num_rows, vocab_size = x.shape
    floors = torch.empty(num_rows, device=x.device)
    _filter_floor[(num_rows,)](
        x,
        top_k,
        top_p,
        min_p.log(),
        floors,
        x.stride(0),
        VOCAB=vocab_size,
        TILE=min(FLOOR_TILE, power_of_2(vocab_size)),
        num_warps=16 if vocab_size > 1024 else 4,
        enable_fp_fusion=True,
    )
    return floors


@on_its_device
def gumbel_argmax_triton(x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
    """See `kernels.sampling.gumbel_argmax`; logarithms may differ from the CPU's in their last bit.

    Programs find the best of their part; argmax takes the first of equals, as they do.
    """
    num_rows, vocab_size = x.shape
    parts = triton.cdiv(vocab_size, DRAW_TILE)
    scores = torch.empty((num_rows, parts), device=x.device)
    tokens = torch.empty((num_rows, parts), dtype=torch.int64, device=x.device)
    _gumbel_argmax[(num_rows, parts)](
        x,
        floor,
        keys.contiguous(),
        scores,
        tokens,
        x.stride(0),
        VOCAB=vocab_size,
        TILE=DRAW_TILE,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return tokens.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


@on_its_device
def penalize_triton(
    x: Tensor,
    rows: Tensor,
    ids: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """See `kernels.sampling.penalize`."""
    _penalize[(triton.cdiv(len(ids), PENALTY_TILE),)](
        x,
        rows,
        ids,
        counts,
        repetition,
        frequency,
        presence,
        len(ids),
        x.stride(0),
        TILE=PENALTY_TILE,
        num_warps=4,
        enable_fp_fusion=False,  # each operation rounds, as torch's do
    )


@triton.jit
def _filter_floor(
    x, top_k, top_p, log_min_p, floors, stride, VOCAB: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    k, p, log_least = tl.load(top_k + row), tl.load(top_p + row), tl.load(log_min_p + row)
    limited = (k > 0) & (k <= VOCAB)
    if (p >= 1) & (log_least == float("-inf")) & (limited == 0):
        tl.store(floors + row, float("-inf"))
        return
    x += row * stride
    best = tl.full([], float("-inf"), tl.float32)
    for start in range(0, VOCAB, TILE):
        place = start + tl.arange(0, TILE)
        part = tl.load(x + place, mask=place < VOCAB, other=float("-inf"))
        best = tl.maximum(best, tl.max(part, 0))
    floor = (best.to(tl.float64) + log_least).to(tl.float32)
    beyond = _ordered(best).to(tl.int64) + 1  # what no logit reaches
    nothing = _ordered(tl.full([], float("-inf"), tl.float32)).to(tl.int64)  # what all reach
    if limited:
        low, high = nothing, beyond
        while high - low > 1:
            middle = (low + high) >> 1
            if _count(x, middle, VOCAB, TILE) >= k:
                low = middle
            else:
                high = middle
        floor = tl.maximum(floor, _number(low))
    if p < 1:
        low, high = _ordered(floor).to(tl.int64), beyond
        wanted = p * _mass(x, best, low, VOCAB, TILE)
        while high - low > 1:
            middle = (low + high) >> 1
            if _mass(x, best, middle, VOCAB, TILE) >= wanted:
                low = middle
            else:
                high = middle
        floor = _number(low)
    tl.store(floors + row, floor)


@triton.jit
def _ordered(x):
    """fp32 as an int32 of the same order; minus zero is less than zero."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(ordered):
    bits = ordered.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _count(x, least, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """How many logits are at least the number that `least` stands for."""
    counts = tl.zeros([TILE], tl.int32)
    for start in range(0, VOCAB, TILE):
        place = start + tl.arange(0, TILE)
        part = tl.load(x + place, mask=place < VOCAB, other=0.0)
        counts += ((_ordered(part) >= least) & (place < VOCAB)).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _mass(x, best, least, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The sum of exp(logit - best) of those logits, in fp64."""
    masses = tl.zeros([TILE], tl.float64)
    for start in range(0, VOCAB, TILE):
        place = start + tl.arange(0, TILE)
        part = tl.load(x + place, mask=place < VOCAB, other=float("-inf"))
        masses += tl.where(_ordered(part) >= least, tl.exp(part - best), 0.0).to(tl.float64)
    return tl.sum(masses, 0)


@triton.jit
def _gumbel_argmax(x, floor, keys, scores, tokens, stride, VOCAB: tl.constexpr, TILE: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = part * TILE + tl.arange(0, TILE)
    logits = tl.load(x + row * stride + ids, mask=ids < VOCAB, other=float("-inf"))
    word0, word1 = tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    kept = (ids < VOCAB) & (logits >= tl.load(floor + row))
    score = tl.where(kept, logits + _gumbel(word0, word1, ids), float("-inf"))
    best = tl.max(score, 0)
    token = tl.min(tl.where(score == best, ids, 0x7FFFFFFF), 0)
    place = row * tl.num_programs(1) + part
    tl.store(scores + place, best)
    tl.store(tokens + place, token.to(tl.int64))


@triton.jit
def _gumbel(word0, word1, ids):
    """See `kernels.noise.gumbel`; log1p(-v) is -v log(u) / (1 - u) for u = 1 - v as rounded
    (Kahan), exact to the last bits however small v is."""
    bits = _mix32(
        _mix32((ids ^ word0).to(tl.uint32, bitcast=True)) + word1.to(tl.uint32, bitcast=True)
    )
    integer = (bits >> 1).to(tl.int32, bitcast=True)
    v = (integer.to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    v = tl.minimum(v, 0.9999999403953552)  # 1 - 2^-24
    u = 1.0 - v
    exponential = tl.where(u == 1.0, v, -tl.log(u) * (v / tl.where(u == 1.0, 1.0, 1.0 - u)))
    return -tl.log(exponential)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit(  # what changes from step to step must not ask for another kernel
    do_not_specialize=["num_entries"],
    do_not_specialize_on_alignment=["ids", "counts", "frequency", "presence"],
)
def _penalize(
    x,
    rows,
    ids,
    counts,
    repetition,
    frequency,
    presence,
    num_entries,
    stride,
    TILE: tl.constexpr,
):
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = entry < num_entries
    row = tl.load(rows + entry, mask=there, other=0).to(tl.int64)
    count = tl.load(counts + entry, mask=there, other=0).to(tl.float32)
    place = x + row * stride + tl.load(ids + entry, mask=there, other=0)
    logit = tl.load(place, mask=there, other=0.0)
    factor = tl.load(repetition + row, mask=there, other=1.0)
    logit = tl.where(logit > 0, tl.div_rn(logit, factor), logit * factor)
    per_use, once = tl.load(frequency + row, mask=there), tl.load(presence + row, mask=there)
    logit -= tl.where(count > 0, per_use * count + once, 0.0)
    tl.store(place, logit, mask=there)
