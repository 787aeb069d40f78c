"""Makes a node's engine from its config: loaded model, KV memory, scheduler, runner."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from engine.beam_search import num_continuations
from engine.config import EngineConfig
from engine.device import tensor_at
from engine.engine import Engine
from engine.grammar import Grammars
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.runner import ModelRunner, at_once
from engine.staging import Staging, staging_bytes
from engine.stops import end_tokens
from engine.unit_copies import WITHOUT_TRITON, UnitCopies
from kvtransfer.cuda_memory import CudaMapping, CudaPool
from kvtransfer.device_pool import OpenPool, Pool
from kvtransfer.shared_memory import SharedMemory
from node.config import NodeConfig
from node.devices import gpu_index, is_gpu
from node.drafting import beside_drafts, draft_layout, load_drafter, make_speculation
from node.gpu import CopyWaiter, Gpu, LayerWaiter
from node.machine import WORK_BYTES, available_memory, default_kv_memory, size
from node.memory import NodeMemory
from node.staged_memory import StagedMemory
from node.transports import shared_gpu_pool, shared_pool
from wire.errors import ConfigError
from wire.fleet_messages import ModelInfo
from wire.layout import KVLayout
from wire.logprobs import MAX_PAIRS, MAX_TOP_LOGPROBS
from wire.types import Role, SamplingParams

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """Everything of a node that computes."""

    config: NodeConfig
    model: LoadedModel
    engine: Engine
    memory: NodeMemory | StagedMemory
    num_blocks: int
    pool: SharedMemory | None = None  # where the blocks are, if other processes may read them
    device_pool: Pool | None = None  # the same of a device
    open_pool: OpenPool | None = None  # maps another process's device pool
    num_failed_graphs: int = 0  # captures; such steps run without

    @property
    def layout(self) -> KVLayout:
        return self.memory.layout

    @property
    def max_model_len(self) -> int:
        return self.model.max_model_len

    @property
    def max_sending_bytes(self) -> int:
        """What transports may hold of blocks that were copied for them; 0: of none were."""
        return self.memory.max_sending_bytes

    def tell_when_lost(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called, with why, when a copy finds the device lost."""
        if isinstance(self.memory, StagedMemory):
            self.memory.on_lost = tell

    def can_hold(self, num_tokens: int, num_shared: int = 0, width: int = 1) -> bool:
        """Whether the KV of so many tokens fits, if nothing else is there.

        Of each of `width` beams, which have the first `num_shared` tokens in common.
        """
        config = self.engine.config
        return config.num_blocks_for_beams(num_shared, num_tokens, width) <= self.num_blocks

    def mistake(
        self, tokens: Sequence[int], num_prompt_tokens: int, sampling: SamplingParams
    ) -> str | None:
        """Why no request can have these tokens and this sampling; None if one can."""
        if not 0 < num_prompt_tokens <= len(tokens):
            return f"a prompt of {num_prompt_tokens} tokens among {len(tokens)}"
        if max(tokens) >= self.model.vocab_size:
            return f"token {max(tokens)} is not below {self.model.vocab_size}"
        room = max(0, self.model.max_model_len - num_prompt_tokens)
        num_output = min(sampling.max_tokens, room)
        if sampling.num_logprob_pairs(num_prompt_tokens, num_output) > MAX_PAIRS:
            return "more logprobs than a message holds"
        if sampling.beam is not None:
            return self._search_mistake(sampling)
        return self.engine.grammar_mistake(sampling.grammar)

    def _search_mistake(self, sampling: SamplingParams) -> str | None:
        """What does not go together with a beam search; a router asks for none of it."""
        given = (sampling.grammar, sampling.logprobs, sampling.prompt_logprobs)
        if any(value not in ("", None) for value in given):
            return "a beam search with logprobs or a grammar"
        beam, ends = sampling.beam, end_tokens(sampling, frozenset(self.model.eos_token_ids))
        if beam is not None and num_continuations(beam, ends) > MAX_TOP_LOGPROBS:
            return f"a beam search with {len(ends)} tokens that end it"
        return None

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            name=self.config.served_model_name,
            fingerprint=self.model.fingerprint,
            numerics=self.model.numerics,
            max_model_len=self.model.max_model_len,
            vocab_size=self.model.vocab_size,
            eos_token_ids=tuple(self.model.eos_token_ids),
        )


def build_engine(roles: Collection[Role], config: NodeConfig, progress: Progress) -> BuiltEngine:
    """Load the model and make the engine of a node that can have `roles`.

    Raises ConfigError with what to do.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    gpu = Gpu(config, decodes=Role.DECODE in roles) if is_gpu(config.device) else None
    model, draft = _load(config, gpu, progress)
    layout = model.kv_layout(config.block_size)
    drafts = draft_layout(draft, config.block_size)
    if gpu:
        num_blocks = beside_drafts(gpu.num_blocks(model, layout, draft), layout, drafts)
    else:
        num_blocks = _num_blocks(config, layout, drafts)
    peers = gpu is not None and model.ops.name.startswith("triton")  # whose kernels read peers
    pool, device_pool = None, None
    if Role.PREFILL in roles:
        pool, device_pool = _pools(config, layout, num_blocks, peers=peers)
    store = _store(config, layout, num_blocks, pool, device_pool)
    prepare = partial(gpu.prepare, progress=progress) if gpu else None
    speculation = make_speculation(config, model, draft, num_blocks, prepare)
    runner = ModelRunner(
        model, store, when_done=LayerWaiter() if gpu else at_once, reader=speculation
    )
    if prepare:
        prepare(runner, model, store)
    engine = Engine(
        _engine_config(config, model, num_blocks),
        runner,
        epoch=secrets.randbits(64),
        model_fingerprint=model.fingerprint,
        eos_token_ids=frozenset(model.eos_token_ids),
        ops=model.ops,
        grammars=_grammars(config.model, model),
        speculation=speculation,
    )
    return BuiltEngine(
        config,
        model,
        engine,
        _memory(engine, store, pool, shared=device_pool is not None, triton=peers),
        num_blocks,
        pool,
        device_pool,
        partial(CudaMapping, device=gpu_index(config.device)) if peers else None,
        gpu.num_failed_graphs if gpu else 0,
    )


def _load(
    config: NodeConfig, gpu: Gpu | None, progress: Progress
) -> tuple[LoadedModel, LoadedModel | None]:
    """The model, and the one that drafts for it."""

    def check(kv_memory: int) -> Callable[[int, str], None]:
        if gpu is not None:
            return gpu.check_size
        return partial(_check_memory, kv_memory, available_memory())

    model = load_model(
        config.model,
        dtype=config.dtype,
        weight_dtype=config.weight_dtype,
        device=config.device,
        max_model_len=config.max_model_len,
        fusing=config.fusing,
        deterministic=config.deterministic,
        check_size=check(config.kv_memory),
        progress=progress,
    )
    obstacle = model.not_deterministic
    log.info("%s; deterministic: %s", model.fusions, f"no, {obstacle}" if obstacle else "yes")
    return model, load_drafter(config, model, check(0), progress)


def _pools(
    config: NodeConfig, layout: KVLayout, num_blocks: int, *, peers: bool
) -> tuple[SharedMemory | None, CudaPool | None]:
    """Memory that others may read: of the blocks, or of what copies them and the GPU's blocks."""
    if not is_gpu(config.device):
        return shared_pool(config, num_blocks * layout.block_bytes), None
    pool = shared_pool(config, staging_bytes(layout.block_bytes))
    if not peers:
        return pool, None
    return pool, shared_gpu_pool(config, (num_blocks + 1) * layout.block_bytes)


def _memory(
    engine: Engine, store: KVStore, pool: SharedMemory | None, *, shared: bool, triton: bool
) -> NodeMemory | StagedMemory:
    if store.blocks.device.type == "cpu":
        return NodeMemory(engine, store)
    num_bytes = staging_bytes(store.layout.block_bytes)
    staging = Staging(num_bytes, pool.buffer if pool else None, pinned=True)
    waiter = CopyWaiter()
    kernels = None if triton else WITHOUT_TRITON
    copies = UnitCopies(store, staging, when_over=waiter, kernels=kernels)
    copies.warm_up(store.num_blocks - 1)  # the one that padding rows write
    memory = StagedMemory(engine, store, staging, copies, shared=shared)
    waiter.on_error = memory.failed
    return memory


def _store(
    config: NodeConfig,
    layout: KVLayout,
    num_blocks: int,
    pool: SharedMemory | None,
    device_pool: CudaPool | None,
) -> KVStore:
    """On a GPU with one more block, which takes what padding rows write."""
    if not is_gpu(config.device):
        return KVStore(layout, num_blocks, buffer=pool.buffer if pool else None)
    memory = None
    if device_pool is not None:
        memory = tensor_at(device_pool.address, len(device_pool), config.device)
    try:
        return KVStore(layout, num_blocks + 1, config.device, memory)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"too little GPU memory: the KV pool of {size(num_blocks * layout.block_bytes)} does "
            f"not fit on {config.device} any more; lower --gpu-memory-utilization"
        ) from error


def _grammars(folder: Path, model: LoadedModel) -> Grammars | None:
    try:
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return Grammars(tokenizer, model.vocab_size, sorted(model.eos_token_ids))
    except (OSError, ValueError) as error:
        log.warning("no structured output with this tokenizer: %s", error)
        return None


def _engine_config(config: NodeConfig, model: LoadedModel, num_blocks: int) -> EngineConfig:
    return EngineConfig(
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=model.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        kv_overcommit=config.kv_overcommit,
        enable_prefix_caching=config.enable_prefix_caching,
        lookahead=config.async_scheduling,
    )


def _check_memory(kv_memory: int, available: int, weight_bytes: int, dtype: str) -> None:
    """Refuse a start that would run this machine out of memory."""
    weights = weight_bytes + WORK_BYTES
    if weights + kv_memory <= available:
        return
    needs = f"weights in {dtype} {size(weight_bytes)}, work {size(WORK_BYTES)}"
    if kv_memory:
        needs += f", --kv-cache-memory {size(kv_memory)}"
    if kv_memory and weights < available:
        remedy = f"set --kv-cache-memory to at most {(available - weights) >> 20}M"
    elif dtype == "float32":
        remedy = "free memory, set --dtype bfloat16, or take a smaller model"
    else:
        remedy = "free memory or take a smaller model"
    raise ConfigError(f"too little memory: {needs}; available {size(available)}; {remedy}")


def _num_blocks(config: NodeConfig, layout: KVLayout, drafts: KVLayout | None) -> int:
    """Blocks of the model, and as many of the one that drafts for it, in the same memory."""
    memory = config.kv_memory or default_kv_memory()
    num_blocks = beside_drafts(memory // layout.block_bytes, layout, drafts)
    if num_blocks < 1:
        more = f" and one of {drafts.block_bytes} bytes of the draft model" if drafts else ""
        raise ConfigError(
            f"--kv-cache-memory {memory} holds no block of {layout.block_bytes} bytes{more}; "
            "give more"
        )
    return num_blocks
