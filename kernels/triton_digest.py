"""XXH3's accumulators in Triton: the sums of all blocks at once, then what needs them in order.

See `kernels.xxh3`, whose `accumulate` this is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import on_its_device
from kernels.xxh3 import BLOCK_WORDS, LANES, LAST_WORDS

BLOCKS = 16  # of 1,024 bytes, per program
AHEAD = 16  # blocks whose sums are read together: each read takes longer than all else


@on_its_device
def accumulate_triton(data: Tensor, secret: Tensor) -> Tensor:
    """See `kernels.xxh3.accumulate`."""
    num_inputs, num_words = data.shape
    num_blocks = (num_words * 8 - 1) // (BLOCK_WORDS * 8)
    sums = torch.empty((num_inputs, num_blocks, LANES), dtype=torch.int64, device=data.device)
    accumulators = torch.empty((num_inputs, LANES), dtype=torch.int64, device=data.device)
    if num_blocks:
        _block_sums[(num_inputs, triton.cdiv(num_blocks, BLOCKS))](
            data,
            secret,
            sums,
            num_blocks,
            data.stride(0),
            BLOCKS=BLOCKS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    _in_order[(num_inputs,)](
        data,
        secret,
        sums,
        accumulators,
        num_blocks,
        num_words,
        data.stride(0),
        LAST=LAST_WORDS,
        AHEAD=AHEAD,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return accumulators


@triton.jit(do_not_specialize=["num_blocks"])
def _block_sums(data, secret, sums, num_blocks, stride, BLOCKS: tl.constexpr):
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    word = tl.arange(0, 128)[None, :]
    there = (block < num_blocks)[:, None]
    unit = tl.program_id(0).to(tl.int64)
    place = unit * stride + (block * 128).to(tl.int64)[:, None] + word
    words = tl.load(data + place, mask=there, other=0).to(tl.uint64, bitcast=True)
    key = tl.load(secret + word // 8 + word % 8).to(tl.uint64, bitcast=True)
    sum_of_block = _stripes(words, key, BLOCKS, 16)
    lane = tl.arange(0, 8)[None, :]
    place = (unit * num_blocks + block)[:, None] * 8 + lane
    tl.store(sums + place, sum_of_block.to(tl.int64, bitcast=True), mask=there)


@triton.jit
def _stripes(words, key, BLOCKS: tl.constexpr, STRIPES: tl.constexpr):
    """[BLOCKS, 8] of words [BLOCKS, STRIPES * 8]; each lane adds its neighbour's words."""
    keyed = words ^ key
    products = (keyed & 0xFFFFFFFF) * (keyed >> 32)
    products = tl.sum(tl.reshape(products, [BLOCKS, STRIPES, 8]), 1)
    even, odd = tl.split(
        tl.reshape(tl.sum(tl.reshape(words, [BLOCKS, STRIPES, 8]), 1), [BLOCKS, 4, 2])
    )
    return products + tl.reshape(tl.join(odd, even), [BLOCKS, 8])


@triton.jit(do_not_specialize=["num_blocks", "num_words"])
def _in_order(
    data,
    secret,
    sums,
    accumulators,
    num_blocks,
    num_words,
    stride,
    LAST: tl.constexpr,
    AHEAD: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 8)
    acc = tl.load(secret + LAST + 8 + lane).to(tl.uint64, bitcast=True)
    key = tl.load(secret + 16 + lane).to(tl.uint64, bitcast=True)
    sums += unit * num_blocks * 8 + lane
    for start in range(0, num_blocks, AHEAD):
        for step in tl.static_range(AHEAD):
            there = start + step + 0 * lane < num_blocks
            part = tl.load(sums + (start + step) * 8, mask=there, other=0)
            mixed = acc + part.to(tl.uint64, bitcast=True)
            mixed = (mixed ^ (mixed >> 47) ^ key) * 0x9E3779B1
            acc = tl.where(there, mixed, acc)
    data += unit * stride
    word = tl.arange(0, 128)[None, :]
    end = (num_words - 1) // 8 * 8 - num_blocks * 128  # whole stripes, but the last of all
    words = tl.load(data + num_blocks * 128 + word, mask=word < end, other=0)
    key = tl.load(secret + word // 8 + word % 8, mask=word < end, other=0)
    acc += _last(words, key, 16)
    word = tl.arange(0, 8)[None, :]
    words = tl.load(data + num_words - 8 + word)
    acc += _last(words, tl.load(secret + LAST + word), 1)
    tl.store(accumulators + unit * 8 + lane, acc.to(tl.int64, bitcast=True))


@triton.jit
def _last(words, key, STRIPES: tl.constexpr):
    """[8] of words [1, STRIPES * 8]; with word and secret 0 nothing is added."""
    words, key = words.to(tl.uint64, bitcast=True), key.to(tl.uint64, bitcast=True)
    return tl.reshape(_stripes(words, key, 1, STRIPES), [8])
