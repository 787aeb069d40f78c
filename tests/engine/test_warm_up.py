"""What is run before the first request: every kernel that a step can come to need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import loader
from engine.gpu_profile import LargestStep
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.warm_up import MIXES, step_shapes, warm_up
from kernels import attention_tiling
from kernels.attention_tiling import choose_tiling
from kernels.device_rows import DeviceRows
from kernels.ops import TorchOps

LARGEST = LargestStep(4096, 128, 8192, 16)


def kernel(
    heads: tuple[int, int], dtype: torch.dtype, shape: tuple[int, int, int], *, invariant: bool
) -> tuple[object, ...]:
    """What Triton compiles for requests of so many (requests, rows, context)."""
    requests, rows, context = shape
    query = torch.empty(requests * rows, heads[0], 128, dtype=dtype, device="meta")
    keys = torch.empty(1, 16, heads[1], 128, dtype=dtype, device="meta")
    numbers = torch.empty(requests, device="meta")
    step = DeviceRows(numbers, numbers, numbers, numbers, max_rows=rows, max_context=context)
    tiling = choose_tiling(query, keys, step, invariant=invariant)
    return tiling.product_rows, tiling.one_tile, tiling.num_splits > 1


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [(8, 8), (24, 8), (32, 8), (40, 8), (28, 4), (71, 1)], ids=str)
def test_no_step_meets_a_kernel_that_was_not_met_before(
    heads: tuple[int, int], dtype: torch.dtype, invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_tiling, "num_processors", lambda _: 132)
    met = {
        kernel(heads, dtype, (1, rows, context), invariant=invariant)
        for rows, context in step_shapes(LARGEST)
    }
    for requests in (1, 5, 100):
        for rows in (*range(1, 140), 2048):
            for context in (1, 8191):
                shape = (requests, rows, max(rows, context))
                assert kernel(heads, dtype, shape, invariant=invariant) in met, shape


def test_steps_stay_within_what_a_node_allows() -> None:
    small = LargestStep(max_num_batched_tokens=6, max_num_seqs=2, max_model_len=40, block_size=4)
    assert list(step_shapes(small)) == [(1, 1), (1, 39), (2, 2), (2, 39), (4, 4), (4, 39)]
    short = LargestStep(max_num_batched_tokens=99, max_num_seqs=2, max_model_len=9, block_size=4)
    assert list(step_shapes(short))[-1] == (8, 8)


def test_nothing_but_the_scratch_block_is_touched(make_model: Callable[[str], Path]) -> None:
    loaded = load_model(make_model("llama"), max_model_len=40)
    store = KVStore(loaded.kv_layout(4), 6)
    store.blocks.fill_(float("nan"))
    store.blocks[5] = 0
    told: list[tuple[int, int]] = []
    sampler = Sampler(frozenset(), loaded.ops)
    largest = LargestStep(16, 4, 40, 4)
    runner = ModelRunner(loaded, store, packed=True)
    warm_up(runner, sampler, largest, 5, lambda done, total: told.append((done, total)))
    assert store.blocks[:5].isnan().all()
    assert store.blocks[5].isfinite().all()
    total = len(list(step_shapes(largest))) + len(MIXES)
    assert told == [(done, total) for done in range(total + 1)]


def test_triton_that_does_not_work_is_told_once_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert loader._gpu_ops("cpu", deterministic=True).name.endswith("invariant")

    def no_compiler(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nmore")

    monkeypatch.setattr("kernels.triton_layers.silu_mul_triton", no_compiler)
    assert isinstance(loader._gpu_ops("cpu", deterministic=False), TorchOps)
    assert [r.message for r in caplog.records] == [
        "no Triton kernels, torch computes, slower and without graphs: "
        "Failed to find C compiler. Please specify via CC"
    ]
