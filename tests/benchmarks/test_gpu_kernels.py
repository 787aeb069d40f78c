"""The figures of the kernels count what they say; small, and interpreted where there is no GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu.clock import Clock, Rate
from benchmarks.gpu.kernels import Cases, Sizes
from benchmarks.gpu.model import TINY, Target
from kernels.triton_ops import TritonOps

SHAPE = replace(TINY, hidden_size=32, heads=2, kv_heads=1)
SIZES = Sizes(1000, 8, paged_batch=2, paged_context=32, prompt=16, moved_blocks=2)


def test_what_is_counted() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target(device, torch.float32, SHAPE, TritonOps())
    assert target.has_kernels
    cases = Cases(target, replace(SIZES, digested_bytes=2048), Clock(device, repeats=1, burst=1))
    assert cases.copy().amount == 2000
    assert cases.product().amount == 2 * 8**3
    decode = cases.paged_decode()
    assert decode.amount == 2 * 2 * 32 * 16 * 4  # keys and values, requests, tokens, dims, bytes
    prefill = cases.prefill_attention()
    assert prefill.amount == 4 * 16 * 16 * 2 * 16 / 2
    gathered, scattered = cases.gather_and_scatter()
    assert gathered.amount == scattered.amount == 2 * (1 * 2 * 2 * 16 * 16) * 4  # a layer
    assert cases.digest().amount == 4096
    assert min(decode.seconds, prefill.seconds, gathered.seconds, scattered.seconds) > 0
    assert (Rate(10, 4) + Rate(2, 2)).per_second == 2


def test_a_burst_is_timed_as_one_and_told_as_its_part() -> None:
    calls: list[int] = []
    clock = Clock(torch.device("cpu"), repeats=3, burst=5)
    assert clock.seconds(lambda: calls.append(1)) >= 0
    assert len(calls) == 2 + 3 * 5
