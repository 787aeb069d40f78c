"""What only a GPU can show: the same engine on one, with real graphs, streams and copies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device import is_out_of_memory, memory_now
from engine.engine import Engine
from engine.gpu_profile import LargestStep, measure
from engine.graphs import WARM_UPS, CudaCapture, ladder
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.staging import Staging
from engine.unit_copies import Copied, Cut, UnitCopies
from engine.warm_up import warm_up
from kernels.block_copy import Part
from kernels.triton_attend import attend
from kvtransfer.digest import content_of
from wire.types import SamplingParams

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of other versions of torch and triton
]
DEVICE = "cuda:0"
BLOCK_SIZE, NUM_BLOCKS, MAX_LEN = 16, 64, 96


class Slow:
    """A runner whose device takes its time: what is read too early is not there yet."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def run(self, plan: StepPlan, *args: Any) -> Tensor:
        torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # cycles
        return self._runner.run(plan, *args)


def run(
    loaded: LoadedModel, *, graphs: bool, lookahead: bool = False, slow: bool = False
) -> dict[str, list[int]]:
    """Greedy and sampled requests that come and go."""
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS + 1, loaded.device)
    store.blocks.fill_(float("nan"))  # an unwritten slot that is read shows at once
    runner = ModelRunner(loaded, store)
    if graphs:
        runner.capture(ladder(8), MAX_LEN, CudaCapture(torch.device(DEVICE)), NUM_BLOCKS)
        assert runner.graphs is not None
        assert runner.graphs.num_failed == 0
        assert runner.graphs.rungs == ladder(8)
    config = EngineConfig(BLOCK_SIZE, NUM_BLOCKS, MAX_LEN, 8, 32, lookahead=lookahead)
    engine = Engine(
        config,
        Slow(runner) if slow else runner,
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(),
        ops=loaded.ops,
    )
    for number in range(7):
        tokens = [(7 * i + 3 * number + 1) % 90 for i in range(5 + 9 * number)]
        sampling = SamplingParams(
            seed=number, max_tokens=12, temperature=float(number % 2), ignore_eos=True
        )
        engine.add(Request(str(number), tokens, len(tokens), sampling, len(tokens) + 12))
    told: dict[str, list[int]] = {}
    num_ahead = 0
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert not result.corrupted
        num_ahead += result.was_ahead
        for progress in result.progress:
            told.setdefault(progress.request_id, []).extend(progress.new_tokens)
    assert (num_ahead > 10) is lookahead
    return told


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("slow", [False, True])
def test_steps_launched_ahead_give_the_same_tokens(
    tiny_llama: Path, graphs: bool, slow: bool
) -> None:
    loaded = load_model(tiny_llama, dtype="float32", device=DEVICE, max_model_len=MAX_LEN)
    expected = run(loaded, graphs=graphs)
    assert run(loaded, graphs=graphs, lookahead=True, slow=slow) == expected


def test_a_gpu_gives_the_tokens_of_the_cpu(tiny_llama: Path) -> None:
    expected = run(load_model(tiny_llama, dtype="float32", max_model_len=MAX_LEN), graphs=False)
    loaded = load_model(tiny_llama, dtype="float32", device=DEVICE, max_model_len=MAX_LEN)
    assert loaded.fusions.decoder, loaded.fusions.reason
    assert run(loaded, graphs=False) == expected
    assert run(loaded, graphs=True) == expected


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_models_of_16_bits_are_fused_and_captured(tiny_llama: Path, dtype: str) -> None:
    loaded = load_model(tiny_llama, dtype=dtype, device=DEVICE, max_model_len=MAX_LEN)
    assert loaded.dtype.itemsize == 2
    assert loaded.ops.name.startswith("triton")
    assert loaded.fusions.decoder, loaded.fusions.reason
    told = run(loaded, graphs=True)
    assert all(len(tokens) == 12 for tokens in told.values())


def test_a_failed_capture_leaves_the_device_as_it_was() -> None:
    device = torch.device(DEVICE)
    capture, current = CudaCapture(device), torch.cuda.current_stream(device)
    numbers = torch.zeros(4, device=device)
    calls = 0

    def asks_the_device() -> None:
        nonlocal calls
        calls += 1
        numbers.add_(1)
        if calls > WARM_UPS:
            numbers.sum().item()  # which no graph can

    with pytest.raises(RuntimeError):
        capture.capture(asks_the_device)
    assert torch.cuda.current_stream(device) == current
    torch.cuda.synchronize()
    before = numbers.clone()
    replay = CudaCapture(device).capture(lambda: numbers.add_(1))
    replay()
    assert torch.equal(numbers, before + WARM_UPS + 1)


def test_kernels_are_tried_before_the_first_request(tiny_llama: Path) -> None:
    """Afterwards, steps of other sizes compile nothing."""
    loaded = load_model(tiny_llama, device=DEVICE, max_model_len=512)
    store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS + 1, DEVICE)
    store.blocks.zero_()
    runner, sampler = ModelRunner(loaded, store), Sampler(frozenset(), loaded.ops)
    largest = LargestStep(512, 8, 512, BLOCK_SIZE)
    warm_up(runner, sampler, largest, NUM_BLOCKS)
    known = num_kernels()
    assert known
    for rows, context in ((1, 7), (3, 100), (5, 400), (21, 21), (100, 300), (200, 511)):
        request = Request("r", [0] * context, context, SamplingParams(max_tokens=1), 513)
        request.block_table = [1] * -(-context // BLOCK_SIZE)
        item = ScheduledRequest(request, context - rows, rows)
        sampler.sample(runner.run(StepPlan((item,))), [request])
    assert num_kernels() == known


def num_kernels() -> int:
    """Compiled ones of attention, with which steps differ most."""
    return sum(len(caches[0]) for caches in attend.device_caches.values())


def test_what_a_model_takes_is_measured(tiny_llama: Path) -> None:
    at_start = memory_now(DEVICE)
    loaded = load_model(tiny_llama, device=DEVICE, max_model_len=MAX_LEN)
    use = measure(loaded, LargestStep(512, 8, MAX_LEN, BLOCK_SIZE), at_start, ladder(8))
    assert use.weights > 0
    assert use.step >= 0
    assert use.graphs > 0
    assert 0 < use.own < use.total
    assert use.free <= use.free_at_start


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_units_travel_through_pinned_memory(tiny_llama: Path, dtype: str) -> None:
    loaded = load_model(tiny_llama, dtype=dtype, device=DEVICE, max_model_len=MAX_LEN)
    layout = loaded.kv_layout(BLOCK_SIZE)
    source, target = (KVStore(layout, 8, DEVICE) for _ in range(2))
    source.blocks.normal_()
    target.blocks.zero_()
    staging = Staging(8 * layout.block_bytes, pinned=True)
    there, here = (UnitCopies(store, staging, when_over=at_the_end) for store in (source, target))
    there.warm_up(7)
    part = Part(0, layout.num_layers, 0, layout.num_kv_heads)
    slots = np.arange(8 * BLOCK_SIZE).reshape(8, BLOCK_SIZE)
    copied: list[Copied] = []
    cut = Cut(part, slots, source.blocks.dtype)
    there.read(cut, lambda _, units: copied.extend(units), seed=7, payload=True)
    sources = [unit.payload for unit in copied if unit.payload is not None]
    assert [unit.content for unit in copied] == [content_of(data, 7) for data in sources]
    assert (staging.num_plain, staging.num_free) == (0, 0), "one region for all of them"
    contents: list[bytes | None] = []
    reverse = Cut(part, slots[::-1].copy(), target.blocks.dtype)
    here.write(reverse, [*sources], lambda _, found: contents.extend(found), seed=7)
    assert contents == [unit.content for unit in copied]
    assert torch.equal(target.blocks.flip(0), source.blocks)


def at_the_end(tell: Callable[[], None]) -> None:
    torch.cuda.current_stream().synchronize()
    tell()


def test_copies_are_told_in_the_loop_that_asked() -> None:
    pytest.importorskip("zmq")
    from node.gpu import CopyWaiter

    async def body() -> None:
        waiter, told = CopyWaiter(), asyncio.Event()
        work = torch.randn(2048, 2048, device=DEVICE)
        for _ in range(100):
            work = work @ work
        waiter(told.set)
        assert not told.is_set(), "the loop does not wait for it"
        await asyncio.wait_for(told.wait(), 20)

    asyncio.run(body())


def test_layers_are_told_in_order_once_the_device_has_done_them() -> None:
    pytest.importorskip("zmq")
    from node.gpu import LayerWaiter

    waiter, told, over = LayerWaiter(), [], torch.cuda.Event()  # type: ignore[no-untyped-call]
    work = torch.randn(2048, 2048, device=DEVICE)

    def tell(num_layers: int) -> None:
        told.append(num_layers)

    for layer in range(1, 9):
        for _ in range(20):
            work = work @ work
        waiter(tell, layer)
    over.record()
    over.synchronize()
    wait_until(lambda: len(told) == 8)
    assert told == list(range(1, 9))


def wait_until(holds: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_device_that_is_full_says_so() -> None:
    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(memory_now(DEVICE).total * 2, dtype=torch.uint8, device=DEVICE)
    assert is_out_of_memory(error.value)


def test_a_node_is_built_on_a_gpu() -> None:
    pytest.importorskip("zmq")
    pytest.importorskip("llguidance")
    from baton.bundled_model import DEFAULT_MODEL
    from node.build import build_engine
    from node.config import NodeConfig
    from wire.types import Role

    for role in (Role.PREFILL, Role.DECODE):
        config = NodeConfig(
            Path(DEFAULT_MODEL), "n", device=DEVICE, gpu_memory_utilization=0.2, max_num_seqs=16
        )
        built = build_engine({role}, config, lambda stage, done, total: None)
        assert built.num_blocks > 100
        assert built.num_failed_graphs == 0
        assert built.max_sending_bytes > 0
