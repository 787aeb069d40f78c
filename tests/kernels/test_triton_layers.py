"""Norm, activation and rotary in Triton against TorchOps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ops import HeadNorms, LayerOps, LayerSlots, TorchOps
from kernels.triton_ops import TritonOps
from tests.kernels.paged_cases import seeded

BLOCK_SIZE = 4
TOLERANCE: dict[
    torch.dtype, dict[str, Any]
] = {  # of 16 bits the interpreter cuts off what a GPU rounds
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}


def no_fallback(case: str) -> None:
    pytest.fail(case)


OPS = TritonOps(warn=no_fallback)


@pytest.mark.parametrize("width", [1, 37, 768])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_norm_and_activation(width: int, dtype: torch.dtype, device: torch.device) -> None:
    weight, x, branch = (
        seeded(*shape, seed=i).to(device, dtype)
        for i, shape in enumerate([(width,), (3, width), (3, width)])
    )
    for added in (None, branch):
        mine, theirs = x.clone(), x.clone()
        found = OPS.add_norm(mine, added, weight, 1e-5)
        expected = TorchOps().add_norm(theirs, added, weight, 1e-5)
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
        torch.testing.assert_close(mine, theirs, **TOLERANCE[dtype])
    gate_up = (20 * seeded(3, 2 * width + 5, seed=3)).to(device, dtype)[:, : 2 * width]
    found, expected = OPS.silu_mul(gate_up), TorchOps().silu_mul(gate_up)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    found, expected = OPS.gelu_mul(gate_up), TorchOps().gelu_mul(gate_up)
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("dim", "turning", "dtype"),
    [
        (8, 8, torch.float32),
        (20, 12, torch.float32),
        (80, 32, torch.bfloat16),
        (96, 96, torch.float16),
        (128, 128, torch.bfloat16),
        (256, 64, torch.float32),
    ],
    ids=str,
)
def test_rotary(
    dim: int, turning: int, dtype: torch.dtype, norms: bool, device: torch.device
) -> None:
    num_rows, query_heads, kv_heads = 3, 5, 2
    qkv = seeded(num_rows, (query_heads + 2 * kv_heads) * dim).to(device, dtype)
    cos, sin = (seeded(num_rows, turning, seed=seed).to(device, dtype) for seed in (1, 2))
    query_norm, key_norm = (seeded(dim, seed=seed).to(device, dtype) for seed in (3, 4))
    head_norms = HeadNorms(query_norm, key_norm, 1e-6) if norms else None
    places = torch.tensor([17, 3, 60], device=device)

    def run(by: LayerOps) -> tuple[Tensor, Tensor]:
        pool = torch.full((16, 3, 2, BLOCK_SIZE, kv_heads, dim), 7, dtype=dtype, device=device)
        slots = LayerSlots(pool[:, 1, 0], pool[:, 1, 1], places // BLOCK_SIZE, places % BLOCK_SIZE)
        mine = qkv.clone()
        by.rotary(mine, cos, sin, slots, num_query_heads=query_heads, norms=head_norms)
        return mine[:, : query_heads * dim], pool

    for found, expected in zip(run(OPS), run(TorchOps()), strict=True):
        torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


def test_rows_that_are_apart(device: torch.device) -> None:
    x, branch = (seeded(3, 40, seed=seed).to(device)[:, :32] for seed in (1, 2))
    weight = seeded(32).to(device)
    theirs = x.clone()
    found = OPS.add_norm(x, branch, weight, 1e-5)
    torch.testing.assert_close(found, TorchOps().add_norm(theirs, branch, weight, 1e-5))
    torch.testing.assert_close(x, theirs)
