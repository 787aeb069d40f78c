"""Decode steps captured once per batch size and replayed: one launch instead of hundreds.

A step of n requests is padded to the next rung of a ladder of sizes. Its numbers go into the buffer
that the rung's graph reads; logits come out of one buffer that all rungs share.

    steps of          1  2  3  4  5 … 8  9 … 16  17 … 24
    replay the rung   1  2  4  4  8      16      24

What records and replays is a `Capture`: CUDA's graphs on a device; elsewhere the call itself, so
that padding, buffers and rungs are the same code on a CPU.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.device import synchronize
from engine.flat_batch import FlatBatch
from engine.plan import StepPlan
from engine.step_inputs import Sizes, StepInputs, fill, host_buffer, put_sampled

log = logging.getLogger(__name__)

Replay = Callable[[], object]
Forward = Callable[[StepInputs], Tensor]
"""Logits [needed rows, vocabulary] of a step."""

FINE, STEP, COARSE_FROM, COARSE_STEP = (1, 2, 4), 8, 256, 32
WARM_UPS = 2  # kernels are compiled and libraries make their handles outside the graph


def ladder(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes to capture, up to the most requests that a step holds."""
    middle = range(STEP, min(max_num_seqs, COARSE_FROM) + 1, STEP)
    coarse = range(COARSE_FROM + COARSE_STEP, max_num_seqs + 1, COARSE_STEP)
    sizes = {*FINE, *middle, *coarse, max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def rung_for(num_requests: int, rungs: tuple[int, ...]) -> int | None:
    """The smallest rung that holds so many; None if none does."""
    index = bisect_left(rungs, num_requests)
    return rungs[index] if index < len(rungs) else None


def can_replay(plan: StepPlan) -> bool:
    """Whether a step only decodes: one row and one token of each request, and nothing else."""
    return all(
        item.num_new_tokens == item.num_logits == 1 and item.request.pooling is None
        for item in plan.scheduled
    )


class Capture(Protocol):
    """Records what a call does on the device."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """Something that does it again on the same memory. May raise whatever `work` meets."""
        ...


class EagerCapture:
    """Replays by calling again: the same steps without graphs."""

    def capture(self, work: Callable[[], object]) -> Replay:
        """See Capture."""
        return work


class CudaCapture:
    """CUDA graphs that share one pool of memory: only one of them runs at a time.

    All warm up on one stream: libraries keep tens of MB of work space for every stream they see.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def capture(self, work: Callable[[], object]) -> Replay:
        """See Capture."""
        with self._aside():
            for _ in range(WARM_UPS):
                work()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        with (
            torch.cuda.stream(current),  # a capture that fails leaves its own as the current one
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            work()
        self._pool = graph.pool()
        return graph.replay

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work of a capture must not begin on the stream that others use."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            yield
        current.wait_stream(self._side)


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """What the buffers of all rungs must hold."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    vocab_size: int
    scratch: int  # the block that padding rows write to; no request has it

    @property
    def blocks_per_request(self) -> int:
        return -(-self.max_model_len // self.block_size)


class DecodeGraphs:
    """The captured decode steps of one model on one KV store.

    Args:
        forward: one forward pass; must launch the same for all inputs of the same sizes.
    """

    def __init__(
        self, limits: GraphLimits, forward: Forward, capture: Capture, device: torch.device
    ) -> None:
        self._limits = limits
        self._forward = forward
        self._capture = capture
        self._device = device
        self._replays: dict[int, Replay] = {}
        self.num_failed = 0  # captures; what they were for runs without a graph
        self.rungs: tuple[int, ...] = ()
        largest = self._sizes(limits.max_num_seqs)
        with torch.inference_mode():
            self._numbers = torch.zeros(largest.starts[-1], dtype=torch.int32, device=device)
            shape = (limits.max_num_seqs, limits.vocab_size)
            self._logits = torch.zeros(shape, dtype=torch.float32, device=device)

    def _sizes(self, rung: int) -> Sizes:
        return Sizes(rung, rung, rung, rung * self._limits.blocks_per_request)

    @torch.inference_mode()
    def capture_all(self, rungs: tuple[int, ...]) -> None:
        """Capture each rung, the largest first: the smaller ones fit into its memory.

        The first that fails ends it; what was captured before stays in use. Raises RuntimeError
        where the device itself is lost.
        """
        for rung in sorted(rungs, reverse=True):
            try:
                self._replays[rung] = self._capture.capture(self._work(rung))
            except RuntimeError as error:  # out of memory is one, too
                self._failed(rung, error)
                break
        self.rungs = tuple(sorted(self._replays))

    def _failed(self, rung: int, error: Exception) -> None:
        self.num_failed += 1
        line = str(error).partition("\n")[0]
        log.warning("no graph of %d requests, such steps run without: %s", rung, line)
        synchronize(self._device)

    def _work(self, rung: int) -> Callable[[], object]:
        sizes = self._sizes(rung)
        logits = self._logits[:rung]
        self._put(rung, FlatBatch.empty())

        def work() -> None:
            inputs = StepInputs.of(
                self._numbers, sizes, max_rows=1, max_context=self._limits.max_model_len
            )
            logits.copy_(self._forward(inputs))

        return work

    def prepare(
        self, plan: StepPlan, flat: FlatBatch, sampled: Tensor | None = None
    ) -> Callable[[], Tensor] | None:
        """Puts the step's numbers in place and gives the forward pass; None: no graph fits.

        It gives logits fp32 [requests, vocabulary], valid until the next one.
        """
        num_requests = len(plan.scheduled)
        rung = rung_for(num_requests, self.rungs)
        if rung is None or not can_replay(plan):
            return None
        self._put(rung, flat, sampled)
        replay = self._replays[rung]

        def forward() -> Tensor:
            replay()
            return self._logits[:num_requests]

        return forward

    def _put(self, rung: int, flat: FlatBatch, sampled: Tensor | None = None) -> None:
        """The step's numbers into the buffer that graphs read, behind what still reads it."""
        sizes = Sizes(rung, rung, rung, len(flat.tables))
        host = host_buffer(sizes.starts[-1], self._device)
        used = fill(host.numpy(), sizes, flat, self._limits.scratch)
        self._numbers[:used].copy_(host[:used], non_blocking=True)
        if sampled is not None:
            put_sampled(self._numbers, sizes, sampled)
