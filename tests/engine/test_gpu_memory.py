"""What a GPU's KV pool gets, and what is said where that is too little."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import gpu_profile
from engine.device import MemoryNow, check_device, is_broken, is_out_of_memory
from engine.gpu_memory import MARGIN, GpuUse, check_weights, pool_bytes
from engine.gpu_profile import (
    MOST_OTHER,
    PER_GRAPH,
    SCRATCH_BLOCKS,
    LargestStep,
    graph_bytes,
    other_bytes,
    try_largest_step,
)
from engine.loader import load_model
from engine.numerics import resolve_dtype
from engine.unit_copies import SCRATCH_BYTES, scratch_size
from wire.errors import ConfigError

GIB = 1 << 30
USE = GpuUse(
    device="cuda:0",
    total=80 * GIB,
    free_at_start=79 * GIB,
    free=61 * GIB,
    weights=15 * GIB,
    other=GIB,
    step=2 * GIB,
    graphs=GIB,
)


def test_the_pool_gets_what_the_share_leaves() -> None:
    assert pool_bytes(USE, 0.9, GIB) == 72 * GIB - 19 * GIB
    assert pool_bytes(USE, 0.5, GIB) == 40 * GIB - 19 * GIB


def test_no_more_than_is_really_free() -> None:
    beside_others = replace(USE, free_at_start=40 * GIB, free=22 * GIB)
    assert pool_bytes(beside_others, 0.9, GIB) == 22 * GIB - GIB - MARGIN


def test_the_scratch_of_handoffs_is_left_room() -> None:
    handing_over = replace(USE, copies=3 * GIB)
    assert pool_bytes(handing_over, 0.9, GIB) == 72 * GIB - 22 * GIB
    full = replace(handing_over, free=22 * GIB)
    assert pool_bytes(full, 0.9, GIB) == 22 * GIB - GIB - 3 * GIB - MARGIN
    assert scratch_size(1 << 20) == SCRATCH_BYTES
    assert scratch_size(1 << 30) == 4 << 30, "a block, widened to fp32"


def test_what_the_operator_wants_wins_where_it_fits() -> None:
    assert pool_bytes(USE, 0.9, GIB, wanted=3 * GIB) == 3 * GIB
    assert pool_bytes(USE, 0.3, GIB, wanted=50 * GIB) == 50 * GIB
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 70\.00 GiB is more than the 59\.94"):
        pool_bytes(USE, 0.9, GIB, wanted=70 * GIB)
    with pytest.raises(ConfigError, match="set --kv-cache-memory to at least 1024M"):
        pool_bytes(USE, 0.9, GIB, wanted=1)


def test_too_little_is_said_in_one_line_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as error:
        pool_bytes(USE, 0.2, GIB)
    assert str(error.value) == (
        "too little GPU memory: 0.00 GiB left for KV, at least 1.00 GiB needed; cuda:0 has "
        "80.00 GiB, 79.00 GiB of it free at start; --gpu-memory-utilization 0.2 allows 16.00 GiB; "
        "weights 15.00 GiB, largest step 2.00 GiB, graphs 1.00 GiB, copies 0.00 GiB, "
        "other 1.00 GiB; raise --gpu-memory-utilization, or lower --max-num-batched-tokens"
    )
    taken = replace(USE, free=GIB)
    with pytest.raises(ConfigError, match="end what else runs there"):
        pool_bytes(taken, 0.9, GIB)


def test_weights_that_cannot_fit_are_not_even_read() -> None:
    check_weights("cuda:0", 15 * GIB, 80 * GIB, 79 * GIB, 0.9)
    with pytest.raises(ConfigError, match=r"weights 75\.00 GiB; cuda:0 has 80\.00 GiB, 79"):
        check_weights("cuda:0", 75 * GIB, 80 * GIB, 79 * GIB, 0.9)
    with pytest.raises(ConfigError, match="too little GPU memory"):
        check_weights("cuda:0", 15 * GIB, 80 * GIB, 10 * GIB, 0.9)


@pytest.mark.parametrize(
    ("tokens", "seats", "longest"), [(64, 5, 50), (8, 20, 50), (100, 4, 10), (4096, 128, 2048)]
)
def test_the_largest_step_fills_the_budget(tokens: int, seats: int, longest: int) -> None:
    largest = LargestStep(tokens, seats, longest, 4)
    plan = largest.plan()
    assert plan.num_tokens == min(tokens, seats * (longest - 1))
    assert len(plan.scheduled) == min(seats, tokens)
    assert len(plan.sampling) == len(plan.scheduled)
    assert all(0 < item.num_new_tokens < longest for item in plan.scheduled)
    blocks = {block for item in plan.scheduled for block in item.request.block_table}
    assert blocks <= set(range(SCRATCH_BLOCKS))


def test_the_largest_step_has_logits_for_every_draft_token() -> None:
    largest = LargestStep(64, 5, 50, 4, num_draft_tokens=3)
    plan = largest.plan()
    assert plan.num_tokens == 64
    assert len(plan.sampling) == plan.num_samples == 5 * (1 + 3)
    assert len(LargestStep(8, 8, 50, 4, num_draft_tokens=3).plan().sampling) == 8, "no room"


def test_the_largest_step_can_be_tried(make_model: Callable[[str], Path]) -> None:
    loaded = load_model(make_model("llama"), max_model_len=40)
    try_largest_step(loaded, LargestStep(50, 4, 40, 4, num_draft_tokens=2))


class CapturingRunner:
    """Keeps 5 GiB, which are given back when a capture begins, and captures 1 GiB."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.kept, self.taken = 5 * GIB, 0
        self.graphs: object = None

    def give_back(self) -> None:
        self.kept = 0

    def capture(self, rungs: tuple[int, ...], *_: object) -> None:
        assert rungs == (8,), "the largest alone"
        self.give_back()  # as torch does when a capture begins
        self.taken, self.graphs = GIB, "some"

    def memory(self, device: str) -> MemoryNow:
        return MemoryNow(80 * GIB, 0, self.kept + self.taken)


def test_what_graphs_take_is_not_hidden_by_memory_that_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner: Any = CapturingRunner()
    monkeypatch.setattr(gpu_profile, "give_back_memory", runner.give_back)
    monkeypatch.setattr(gpu_profile, "memory_now", runner.memory)
    monkeypatch.setattr(gpu_profile, "CudaCapture", lambda device: None)
    largest = LargestStep(512, 8, 100, 4)
    assert graph_bytes(runner, largest, (1, 2, 4, 8)) == GIB + 4 * PER_GRAPH
    assert graph_bytes(runner, largest, ()) == 0


def test_what_others_take_meanwhile_is_not_counted_as_this_nodes() -> None:
    """A second node of the same card loads its weights while the first one measures."""
    start = MemoryNow(80 * GIB, 79 * GIB, 0)
    assert other_bytes(start, MemoryNow(80 * GIB, 60 * GIB, 18 * GIB)) == GIB
    beside_another = MemoryNow(80 * GIB, 44 * GIB, 18 * GIB)
    assert other_bytes(start, beside_another) == MOST_OTHER
    assert other_bytes(start, MemoryNow(80 * GIB, 70 * GIB, 18 * GIB)) == 0, "somebody left"


def test_a_device_that_is_not_there_is_named() -> None:
    check_device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"--device cuda:0: .*\(--device cpu computes"):
            check_device("cuda:0")


@pytest.mark.parametrize(
    ("stored", "bf16", "chosen"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, True, torch.bfloat16),
        (torch.float16, True, torch.float16),
        (torch.bfloat16, False, torch.float16),
        (torch.float32, False, torch.float16),
    ],
)
def test_a_gpu_computes_in_16_bits(stored: torch.dtype, bf16: bool, chosen: torch.dtype) -> None:
    assert resolve_dtype("auto", stored, device="cuda:0", has_bf16_units=bf16) is chosen
    assert resolve_dtype("float32", stored, device="cuda:0", has_bf16_units=bf16) is torch.float32


def test_out_of_memory_is_not_the_end_and_a_cuda_error_is() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(full)
    assert not is_broken(full)
    assert is_broken(torch.AcceleratorError("CUDA error: an illegal memory access"))
    assert is_broken(RuntimeError("CUDA error: unspecified launch failure"))
    assert is_broken(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling"))
    assert is_broken(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))
    for message in (
        "CUDA error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ):
        assert is_out_of_memory(RuntimeError(message))
        assert not is_broken(RuntimeError(message))
    assert not is_broken(RuntimeError("shapes cannot be multiplied"))
    assert not is_broken(ValueError("CUDA error"))
