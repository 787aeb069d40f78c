"""Packed linears of every storage against `F.linear`, for every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu_linear import PANEL, pack
from kernels.cpu_ops import ISA_NAMES, CpuOps, load_cpu_ops
from kernels.huge_pages import ARENA_BYTES, Arena
from kernels.weights import STORAGES, store

# One output, less than a panel, whole panels, one more; inputs of one chunk (128) and its borders.
SIZES = [(1, 1), (36, 100), (64, 128), (65, 129), (130, 300), (512, 256)]
ROWS = [1, 2, 5, 6, 7, 13, 24, 25, 30, 31, 36, 239, 240, 241, 300]  # tiles, few rows, many
MOST_ROWS = 300


@pytest.fixture(params=ISA_NAMES)
def ops(request: pytest.FixtureRequest) -> Iterator[CpuOps]:
    loaded = load_cpu_ops()
    if loaded is None:
        pytest.skip("the CPU kernels were not built: there was no C++ compiler")
    best = loaded.isa
    loaded.use_isa(request.param)
    if loaded.isa != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield loaded
    loaded.use_isa(best)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_equals_torchs_and_keeps_its_bits(
    ops: CpuOps, storage: str, with_bias: bool
) -> None:
    for out_features, in_features in SIZES:
        weight = store(seeded(out_features, in_features), storage)
        bias = seeded(out_features, seed=1) if with_bias else None
        packed = pack(weight, bias, Arena())
        x = seeded(MOST_ROWS, in_features, seed=2)
        whole = ops.linear(x, packed)
        wide_bias = None if bias is None else bias.double()
        expected = F.linear(x.double(), weight.widened().double(), wide_bias)
        torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-4)
        for rows in ROWS:
            assert torch.equal(ops.linear(x[:rows].contiguous(), packed), whole[:rows]), rows
        assert ops.linear(x[:0], packed).shape == (0, out_features)


def test_rows_may_be_apart_and_threads_change_no_bit(ops: CpuOps) -> None:
    packed = pack(store(seeded(200, 150), "float32"), None, Arena())
    wide = seeded(40, 300)
    expected = ops.linear(wide[:, :150].contiguous(), packed)
    assert torch.equal(ops.linear(wide[:, :150], packed), expected)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 2)
    try:
        assert torch.equal(ops.linear(wide[:, :150], packed), expected)
    finally:
        torch.set_num_threads(threads)


def test_16_bits_lose_nothing_of_a_weight_that_has_them() -> None:
    tiny = torch.tensor([[6e-8, -6.1e-5, 0.0, -0.0, 65504.0, 1.0]])  # subnormal and largest float16
    for storage in ("float16", "bfloat16"):
        weight = torch.cat([seeded(3, 6), tiny]).to(getattr(torch, storage)).float()
        assert torch.equal(store(weight, storage).widened(), weight)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_widening_is_exact(ops: CpuOps, storage: str) -> None:
    """Every finite number of 16 bits, through a product with one."""
    values = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(getattr(torch, storage))
    values = values[values.isfinite()].unsqueeze(1)
    weight = store(values.float(), storage)
    found = ops.linear(torch.ones(1, 1), pack(weight, None, Arena()))
    assert torch.equal(found.squeeze(0), values.float().squeeze(1))


def test_int8_is_symmetric_with_a_scale_per_output() -> None:
    weight = seeded(5, 64)
    weight[2] = 0
    weight[3] *= 1000
    stored = store(weight, "int8")
    assert stored.scales is not None
    assert stored.values.abs().amax(dim=1).tolist() == [127, 127, 0, 127, 127]
    error = (stored.widened() - weight).abs()
    assert bool((error <= stored.scales.unsqueeze(1) * 0.5001).all())


def test_what_float16_cannot_hold_is_refused() -> None:
    with pytest.raises(OverflowError, match="float16"):
        store(torch.tensor([[70000.0]]), "float16")


def test_an_arena_hands_out_memory_of_its_own() -> None:
    arena = Arena()
    tensors = [arena.empty((n, 3), torch.float32) for n in (1, 7, 100)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert arena.empty((ARENA_BYTES + 64,), torch.uint8).numel() == ARENA_BYTES + 64
    assert PANEL * 4 % 64 == 0
