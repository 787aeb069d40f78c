"""Measures what a model takes of a GPU besides the KV pool: its largest step is tried once.

    weights      what tensors take once the model is loaded
    largest step as many tokens as a step may hold, by as many requests, then sampling for all
    graphs       the largest rung is captured on a pool of a few blocks; smaller ones fit into its
                 memory and cost a little each for themselves. A draft model has graphs of its own
    other        what the device has less than tensors took: code, work space of libraries

Another process may take memory meanwhile, such as a node that starts beside this one: graphs are
counted by what this process's allocator holds, and `other` by no more than libraries ever take.

Whatever is read or written here are a few scratch blocks; the numbers mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.device import MemoryNow, give_back_memory, memory_now
from engine.gpu_memory import GpuUse
from engine.graphs import CudaCapture
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from engine.unit_copies import scratch_size
from wire.types import SamplingParams

SCRATCH_BLOCKS = 8
PER_GRAPH = 8 << 20  # of a rung besides the memory that all share
MOST_OTHER = 2 << 30  # what is more was taken by somebody else
SAMPLING = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.9, top_k=50, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class LargestStep:
    """What a step may come to."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    num_draft_tokens: int = 0  # of a request; each has a row of logits

    def plan(self) -> StepPlan:
        """Prompts of about equal lengths that fill the budget; their blocks are the scratch's.

        Each with as many draft tokens at its end as there may be.
        """
        budget = self.max_num_batched_tokens
        seats = min(self.max_num_seqs, budget)
        longest = self.max_model_len - 1
        budget = min(budget, seats * longest)
        ends = [budget * (number + 1) // seats for number in range(seats)]
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return StepPlan(
            tuple(self._prompt(number, length) for number, length in enumerate(lengths))
        )

    def _prompt(self, number: int, length: int) -> ScheduledRequest:
        draft = (0,) * min(self.num_draft_tokens, length - 1)
        known = length - len(draft)
        made = Request(str(number), [0] * known, known, SAMPLING, known + 1)
        num_blocks = -(-length // self.block_size)
        made.block_table = [block % SCRATCH_BLOCKS for block in range(num_blocks)]
        return ScheduledRequest(made, 0, length, draft)


def runner_on_scratch(loaded: LoadedModel, block_size: int) -> ModelRunner:
    """A runner on a pool of a few blocks."""
    store = KVStore(loaded.kv_layout(block_size), SCRATCH_BLOCKS + 1, loaded.device)
    store.blocks.zero_()
    return ModelRunner(loaded, store)


def try_largest_step(loaded: LoadedModel, largest: LargestStep) -> ModelRunner:
    """Run it, sampling included; the runner is returned for what else is to be tried."""
    runner = runner_on_scratch(loaded, largest.block_size)
    plan = largest.plan()
    logits = runner.run(plan)
    Sampler(frozenset(), loaded.ops).sample(logits, plan.sampling)
    return runner


def measure(
    loaded: LoadedModel,
    largest: LargestStep,
    at_start: MemoryNow,
    rungs: tuple[int, ...],
    draft: LoadedModel | None = None,
) -> GpuUse:
    """What this process takes of the GPU, by trying. Raises torch.OutOfMemoryError.

    Args:
        draft: a model beside it, whose steps are smaller.
    """
    device = torch.device(loaded.device)
    give_back_memory()
    before = memory_now(loaded.device)
    weights = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner = try_largest_step(loaded, largest)
    after = memory_now(loaded.device)
    step = torch.cuda.max_memory_reserved(device) - before.reserved
    graphs = graph_bytes(runner, largest, rungs)
    del runner
    if draft is not None:
        graphs += graph_bytes(runner_on_scratch(draft, largest.block_size), largest, rungs)
    give_back_memory()
    return GpuUse(
        device=loaded.device,
        total=at_start.total,
        free_at_start=at_start.free,
        free=after.free,
        weights=weights,
        other=other_bytes(at_start, after) + before.reserved - weights,
        step=step,
        graphs=graphs,
        copies=scratch_size(loaded.kv_layout(largest.block_size).block_bytes),
    )


def other_bytes(at_start: MemoryNow, now: MemoryNow) -> int:
    """What the device has less of than tensors took."""
    return min(MOST_OTHER, max(0, at_start.free - now.free - now.reserved))


def graph_bytes(runner: ModelRunner, largest: LargestStep, rungs: tuple[int, ...]) -> int:
    """What a ladder of graphs takes, by the capture of its largest.

    A capture gives kept memory back itself; were that not done before, it would hide what it takes.
    """
    if not rungs:
        return 0
    device = str(runner.device)
    give_back_memory()
    before = memory_now(device).reserved
    runner.capture((max(rungs),), largest.max_model_len, CudaCapture(runner.device), SCRATCH_BLOCKS)
    if runner.graphs is None:
        return 0
    taken = memory_now(device).reserved - before
    return max(0, taken) + PER_GRAPH * len(rungs)
