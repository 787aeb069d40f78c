"""The batch-invariant linear in Triton: near F.linear, and with the same bits in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels import triton_matmul
from kernels.triton_matmul import PARALLEL_ROWS, linear_invariant_triton, num_parts
from tests.kernels.paged_cases import seeded

MOST = PARALLEL_ROWS + 9
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 4e-2, "atol": 4e-2},
}


@pytest.mark.parametrize(
    ("dtype", "has_bias"),
    [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)],
    ids=str,
)
def test_any_number_of_rows_has_the_same_bits(
    dtype: torch.dtype, has_bias: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_matmul, "MIN_STEPS", 1)  # a weight so small has parts, too
    width, depth = 70, 300
    assert num_parts(width, depth) == 4
    x = seeded(MOST, depth + 8).to(device, dtype)[:, :depth]
    weight = seeded(width, depth, seed=1).to(device, dtype)
    bias = seeded(width, seed=2).to(device, dtype) if has_bias else None
    whole = linear_invariant_triton(x, weight, bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias), **TOLERANCE[dtype])
    for rows in (1, 2, 17, PARALLEL_ROWS):
        assert torch.equal(linear_invariant_triton(x[:rows], weight, bias), whole[:rows]), rows
    assert torch.equal(linear_invariant_triton(x[5:6], weight, bias), whole[5:6])


def test_shapes(device: torch.device) -> None:
    weight = seeded(8, 16).to(device)
    x = seeded(2, 3, 16, seed=1).to(device)
    torch.testing.assert_close(linear_invariant_triton(x, weight), F.linear(x, weight))
    assert linear_invariant_triton(x[:, :0], weight).shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("width", "depth", "parts"), [(4096, 4096, 8), (28672, 4096, 2), (128256, 4096, 1), (64, 64, 1)]
)
def test_the_sum_is_cut_by_the_weights_shape_alone(width: int, depth: int, parts: int) -> None:
    assert num_parts(width, depth) == parts
