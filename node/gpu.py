"""What a node on a GPU does besides: fit its memory, capture its graphs, wait for its layers."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Queue

import torch

from engine.device import check_device, is_out_of_memory, memory_now, use_device
from engine.gpu_memory import check_weights, pool_bytes
from engine.gpu_profile import LargestStep, measure
from engine.graphs import CudaCapture, ladder
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.runner import LayersDone, ModelRunner
from engine.sampler import Sampler
from engine.warm_up import warm_up
from node.config import NodeConfig
from wire.errors import ConfigError
from wire.layout import KVLayout

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_MAX_WAITING = 4096  # layers or copies: many steps' worth


class Gpu:
    """One node's GPU, from before the model is loaded on. Raises ConfigError with what to do.

    Args:
        decodes: the node's steps decode, so graphs are of use.
    """

    def __init__(self, config: NodeConfig, *, decodes: bool) -> None:
        check_device(config.device)
        use_device(config.device)
        self._config = config
        self.num_failed_graphs = 0  # captures; such steps run without
        self._at_start = memory_now(config.device)
        self._rungs = ladder(config.max_num_seqs) if config.cuda_graphs and decodes else ()

    def check_size(self, weight_bytes: int, dtype: str) -> None:
        """Refuse weights that cannot fit, before they are read."""
        start, share = self._at_start, self._config.gpu_memory_utilization
        check_weights(self._config.device, weight_bytes, start.total, start.free, share)

    def num_blocks(
        self, model: LoadedModel, layout: KVLayout, draft: LoadedModel | None = None
    ) -> int:
        """Blocks of the KV pool that fit beside all else; one more is left for padding."""
        config = self._config
        try:
            use = measure(model, self._largest(model), self._at_start, self._rungs, draft)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"too little GPU memory: a step of {config.max_num_batched_tokens} tokens does not "
                f"fit on {config.device} beside the weights; lower --max-num-batched-tokens or "
                "--max-num-seqs, or take a smaller model"
            ) from error
        needed = 2 * layout.block_bytes
        room = pool_bytes(use, config.gpu_memory_utilization, needed, config.kv_memory)
        log.info("KV pool of %d MiB; %s", room >> 20, use.told(config.gpu_memory_utilization))
        return room // layout.block_bytes - 1

    def prepare(
        self, runner: ModelRunner, model: LoadedModel, store: KVStore, progress: Progress
    ) -> None:
        """Capture what can be captured and run the rest once, so that no request waits for it.

        Args:
            store: the runner's; no request has its last block.
        """
        began, scratch = time.monotonic(), store.num_blocks - 1
        sampler = Sampler(frozenset(model.eos_token_ids), model.ops)
        tell = partial(progress, "trying kernels")
        try:
            runner.capture(self._rungs, model.max_model_len, CudaCapture(runner.device), scratch)
            nobody_reads = ModelRunner(model, store)
            warm_up(nobody_reads, sampler, self._largest(model), scratch, tell)
        except RuntimeError as error:
            raise ConfigError(_first_steps_failed(self._config.device, error)) from error
        if runner.graphs is not None:
            log.info("graphs of decode steps for batches of %s", runner.graphs.rungs)
            self.num_failed_graphs += runner.graphs.num_failed
        log.info("graphs and kernels of %s took %.1f s", model.name, time.monotonic() - began)

    def _largest(self, model: LoadedModel) -> LargestStep:
        config, speculative = self._config, self._config.speculative
        return LargestStep(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            model.max_model_len,
            config.block_size,
            0 if speculative.method == "none" else speculative.num_speculative_tokens,
        )


def _first_steps_failed(device: str, error: RuntimeError) -> str:
    if is_out_of_memory(error):
        return (
            f"too little GPU memory: on {device} not even small steps fit beside the KV pool; "
            "lower --gpu-memory-utilization"
        )
    line = str(error).partition("\n")[0]
    return f"{device} fails in its first steps: {line}; see its driver, or set --device cpu"


class StreamWaiter:
    """Calls back once the device has done what was launched on the current stream.

    Whoever launched it goes on; a thread waits for the events, in their order, so that neither
    steps nor the event loop do. The callbacks are called there.

    Args:
        on_lost: called there, with the error, when the device is lost; nothing is waited for then.
    """

    def __init__(self, name: str, on_lost: Callable[[Exception], None]) -> None:
        self._on_lost = on_lost
        self._waiting: Queue[tuple[torch.cuda.Event, Callable[[], None]]] = Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, tell: Callable[[], None]) -> None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.put((event, tell))

    def _run(self) -> None:
        while True:
            event, tell = self._waiting.get()
            try:
                event.synchronize()
            except RuntimeError as error:
                self._on_lost(error)
                return
            tell()


class CopyWaiter:
    """Calls back in the event loop that asks (see engine.unit_copies.WhenOver).

    `on_error` is called there, too, when the device is lost: what waits is never told then.
    """

    def __init__(self) -> None:
        self.on_error: Callable[[Exception], None] = _copies_lost
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter = StreamWaiter("copies", lambda error: self._post(self.on_error, error))

    def __call__(self, tell: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiter(partial(self._post, tell))

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, *args)


class LayerWaiter:
    """Tells of a layer once the device has done it (see engine.runner.WhenDone)."""

    def __init__(self) -> None:
        self._waiter = StreamWaiter("layers", _layers_lost)

    def __call__(self, tell: LayersDone, num_layers: int) -> None:
        self._waiter(partial(tell, num_layers))


def _copies_lost(error: Exception) -> None:
    log.error("copies are not waited for any more: %s", error)


def _layers_lost(error: Exception) -> None:
    """The engine's thread meets the same error and ends the node."""
    log.error("layers are not waited for any more: %s", error)
