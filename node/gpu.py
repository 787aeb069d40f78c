"""What a node on a GPU does besides: fit its memory, capture its graphs, wait for its layers."""

from __future__ import annotations

import logging
import threading
from queue import Queue

import torch

from engine.device import check_device, memory_now, use_device
from engine.gpu_memory import check_weights, pool_bytes
from engine.gpu_profile import LargestStep, measure
from engine.graphs import CudaCapture, ladder
from engine.model_info import LoadedModel
from engine.runner import LayersDone, ModelRunner
from node.config import NodeConfig
from wire.errors import ConfigError
from wire.layout import KVLayout

log = logging.getLogger(__name__)

_MAX_WAITING = 4096  # layers: many steps' worth


class Gpu:
    """One node's GPU, from before the model is loaded on. Raises ConfigError with what to do.

    Args:
        decodes: the node's steps decode, so graphs are of use.
    """

    def __init__(self, config: NodeConfig, *, decodes: bool) -> None:
        check_device(config.device)
        use_device(config.device)
        self._config = config
        self._at_start = memory_now(config.device)
        self._rungs = ladder(config.max_num_seqs) if config.cuda_graphs and decodes else ()

    def check_size(self, weight_bytes: int, dtype: str) -> None:
        """Refuse weights that cannot fit, before they are read."""
        start, share = self._at_start, self._config.gpu_memory_utilization
        check_weights(self._config.device, weight_bytes, start.total, start.free, share)

    def num_blocks(self, model: LoadedModel, layout: KVLayout) -> int:
        """Blocks of the KV pool that fit beside all else; one more is left for padding."""
        config = self._config
        largest = LargestStep(
            config.max_num_batched_tokens,
            config.max_num_seqs,
            model.max_model_len,
            config.block_size,
        )
        try:
            use = measure(model, largest, self._at_start, self._rungs)
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

    def capture(self, runner: ModelRunner, model: LoadedModel, scratch: int) -> int:
        """Make the graphs; how many failed."""
        device = torch.device(self._config.device)
        runner.capture(self._rungs, model.max_model_len, CudaCapture(device), scratch)
        if runner.graphs is None:
            return 0
        log.info("graphs of decode steps for batches of %s", runner.graphs.rungs)
        return runner.graphs.num_failed


class LayerWaiter:
    """Tells of a layer once the device has done it (see engine.runner.WhenDone).

    The engine's thread only marks the place in the stream and goes on launching; a thread of its
    own waits, so that neither steps nor the event loop do.
    """

    def __init__(self) -> None:
        self._waiting: Queue[tuple[torch.cuda.Event, LayersDone, int]] = Queue(_MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="layers", daemon=True)
        self._thread.start()

    def __call__(self, tell: LayersDone, num_layers: int) -> None:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._waiting.put((event, tell, num_layers))

    def _run(self) -> None:
        while True:
            event, tell, num_layers = self._waiting.get()
            try:
                event.synchronize()
            except RuntimeError:  # the engine's thread meets the same error and ends the node
                log.exception("layers are not waited for any more")
                return
            tell(num_layers)
