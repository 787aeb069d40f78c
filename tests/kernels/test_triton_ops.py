"""TritonOps as a whole: what it falls back on, and what it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from kernels.ops import PackedRows, TorchOps
from kernels.triton_ops import TritonOps
from tests.kernels.paged_cases import make_case, seeded

ROOT = Path(__file__).resolve().parents[2]


def test_what_no_kernel_takes_goes_to_torch_with_one_warning(device: torch.device) -> None:
    said: list[str] = []
    ops = TritonOps(warn=said.append)
    case = make_case([(2, 9), (1, 4)], (2, 1), 6, device=device)  # heads of 6
    rows = PackedRows(case.requests)
    for _ in range(3):
        found = ops.attention(case.query, case.keys, case.values, rows, scale=0.3)
        torch.testing.assert_close(found, case.reference(scale=0.3))
    assert len(said) == 1
    assert "attention with heads (2, 6)" in said[0]

    x = seeded(2, 8).to(device, torch.float64)
    torch.testing.assert_close(ops.silu_mul(x), TorchOps().silu_mul(x))
    residual = x.clone()
    expected = TorchOps().add_norm(x.clone(), x, x[0], 1e-5)
    torch.testing.assert_close(ops.add_norm(residual, x, x[0], 1e-5), expected)
    assert len(said) == 3


def test_its_name_tells_what_decides_the_bits() -> None:
    plain, invariant = TritonOps(), TritonOps(invariant=True)
    assert plain.name.startswith("triton-3")
    assert invariant.name == f"{plain.name}-invariant"
    assert not plain.is_batch_invariant(128, 4)
    assert invariant.is_batch_invariant(128, 4)
    assert not invariant.is_batch_invariant(300, 4)
    assert invariant.is_batch_invariant(256, 64)
    assert not invariant.is_batch_invariant(256, 65), "more than an A100 holds in fp32"


def test_importing_the_operations_imports_no_triton() -> None:
    code = "import sys, kernels, kernels.ops, kernels.cpu_ops; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
