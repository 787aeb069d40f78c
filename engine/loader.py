"""Loads a model through transformers, and refuses what would be served wrongly.

    headers → fingerprint → from_pretrained → nothing missing → finite → fix RoPE → probe → fuse
            → deterministic?

What is asked of transformers itself is in `from_transformers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, Progress, fingerprint, open_checkpoint
from engine.determinism import why_not_deterministic
from engine.device import check_device, has_bf16, is_gpu, synchronize, use_device
from engine.final_states import telling_states
from engine.from_transformers import check_finite, first_line, load, quiet, read_config
from engine.fused_decoder import FusedDecoder
from engine.fused_modules import Fusions
from engine.fusing import fuse
from engine.fusing_proof import PROOF_BLOCK_SIZE
from engine.model_info import LoadedModel, eos_token_ids, resolve_max_model_len
from engine.numerics import dtype_name, has_bf16_units, numerics_fingerprint, resolve_dtype
from engine.packed_linear import Linears, PlainLinear
from engine.probe import AttentionShape, probe
from engine.process_memory import MappedFiles, trim
from engine.rope import fix_frequencies
from kernels.cpu_ops import load_cpu_ops
from kernels.ops import LayerOps, TorchOps
from kernels.weights import STORAGES
from wire.errors import ConfigError
from wire.layout import KVLayout

log = logging.getLogger(__name__)

PROBE_LEN = 2048  # for a model that names no maximal length


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    weight_dtype: str = "auto",
    device: str = "cpu",
    max_model_len: int | None = None,
    fusing: bool = True,
    deterministic: bool = False,
    check_size: Callable[[int, str], None] = lambda num_bytes, dtype: None,
    progress: Progress = lambda stage, done, total: None,
) -> LoadedModel:
    """Load the model folder at `path` and prove that it can be served.

    Args:
        weight_dtype: what linears' weights are rounded to in memory; see `kernels.weights`.
        deterministic: refuse a model whose logits may depend on what shares its steps.
        check_size: told the weights' bytes in memory and their dtype before they are read; raises
            where they do not fit.

    Raises ConfigError where files or arguments are wrong and UnsupportedModelError where the
    architecture cannot be served; both in one line that says what to do.
    """
    check_device(device)
    use_device(device)
    checkpoint = open_checkpoint(path)
    config, architecture = read_config(checkpoint)
    length = resolve_max_model_len(config, max_model_len)
    chosen = _choose_dtype(config, dtype, weight_dtype, device)
    storage = _choose_storage(weight_dtype, chosen, device, fusing=fusing)
    check_size(_bytes_in_memory(checkpoint, config, chosen), dtype_name(chosen))
    digest = fingerprint(checkpoint, progress)
    model, unexpected = load(checkpoint, config, chosen, architecture, progress)
    model, shape, can_embed = _probed(model, architecture, length, device, progress)
    if length is None:
        raise ConfigError(f"{architecture}: its config has no maximal length; give --max-model-len")
    num_weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    ops = _choose_ops(chosen, device, deterministic=deterministic)
    model, fusions = _fuse(model, shape, ops, storage, MappedFiles(checkpoint.files), wanted=fusing)
    trim()
    if deterministic and is_gpu(device) and isinstance(model, FusedDecoder):
        _make_invariant(model)
    obstacle = _obstacle(model, ops, shape, fusions, architecture, deterministic=deterministic)
    return LoadedModel(
        model=model,
        config=config,
        name=checkpoint.folder.resolve().name,
        architecture=architecture,
        dtype=chosen,
        device=device,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_model_len=length,
        eos_token_ids=eos_token_ids(config, checkpoint.folder),
        fingerprint=digest,
        numerics=numerics_fingerprint(
            dtype=chosen, device=device, kernels=_kernels(ops, fusions, obstacle)
        ),
        ops=ops,
        fusions=fusions,
        not_deterministic=obstacle,
        num_weight_bytes=num_weight_bytes,
        unexpected_tensors=unexpected,
        can_embed=can_embed,
    )


def _obstacle(
    model: Any,
    ops: LayerOps,
    shape: AttentionShape,
    fusions: Fusions,
    architecture: str,
    *,
    deterministic: bool,
) -> str:
    """Why logits may depend on what shares a step; empty if they cannot. One that counts raises."""
    obstacle = why_not_deterministic(
        model, ops, head_dim=shape.head_dim, num_kv_heads=shape.num_kv_heads
    )
    if deterministic and obstacle:
        why = ": ".join(filter(None, (obstacle, fusions.reason)))
        raise ConfigError(f"--deterministic: {architecture} cannot be served so here: {why}")
    return obstacle


def _probed(
    model: Any, architecture: str, length: int | None, device: str, progress: Progress
) -> tuple[Any, AttentionShape, bool]:
    """The model on its device, checked and tried; how it attends; whether it shows its states."""
    model = _to_device(model.eval(), device)  # first: a GPU reads all numbers at once
    check_finite(model, progress)
    model.config.pad_token_id = None  # nothing is padded; some models look for it at every step
    fix_frequencies(model, length or PROBE_LEN)
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    states: list[Tensor] = []
    with quiet(), telling_states(model, states.append):
        shape = probe(model, architecture, num_layers, length or PROBE_LEN)
    return model, shape, bool(states)


def _choose_dtype(config: Any, requested: str, weight_dtype: str, device: str) -> torch.dtype:
    if requested == "auto" and weight_dtype != "auto":
        requested = "float32"  # what narrower weights are widened to
    stored = _stored_dtype(config)
    bf16 = has_bf16(device) if is_gpu(device) else has_bf16_units()
    return resolve_dtype(requested, stored, device=device, has_bf16_units=bf16)


def _choose_storage(requested: str, dtype: torch.dtype, device: str, *, fusing: bool) -> str:
    """What linears' weights are rounded to; refuses what cannot be."""
    if requested == "auto":
        return dtype_name(torch.float32)
    if requested not in STORAGES:
        raise ConfigError(f"weight dtype {requested!r} is not one of auto, {', '.join(STORAGES)}")
    if device != "cpu" or dtype is not torch.float32:
        raise ConfigError(f"--weight-dtype {requested} is for CPUs with --dtype float32")
    if not fusing and requested != dtype_name(dtype):
        raise ConfigError(f"--weight-dtype {requested} and --no-fusing exclude each other")
    return requested


def _stored_dtype(config: Any) -> torch.dtype:
    stored = config.dtype or config.get_text_config(decoder=True).dtype
    return stored if isinstance(stored, torch.dtype) else torch.float32


def _bytes_in_memory(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> int:
    """What the weights will take, if all are stored in the config's dtype."""
    return checkpoint.num_bytes * dtype.itemsize // _stored_dtype(config).itemsize


def _choose_ops(dtype: torch.dtype, device: str, *, deterministic: bool) -> LayerOps:
    """The fastest operations for the model's device and dtype."""
    if is_gpu(device):
        return _gpu_ops(device, deterministic=deterministic)
    if device == "cpu" and dtype is torch.float32:
        return load_cpu_ops() or TorchOps()
    return TorchOps()


def _gpu_ops(device: str, *, deterministic: bool) -> LayerOps:
    """Triton's kernels; where Triton does not work, torch, which is said once.

    Triton compiles with what the machine has: no C compiler, no headers of Python or a GPU that is
    too old show at the first kernel.
    """
    try:
        from kernels.triton_ops import TritonOps

        ops = TritonOps(invariant=deterministic)
        ops.silu_mul(torch.zeros(1, 2, device=device))
    except Exception as error:  # of Triton's many kinds, and of the tools that it calls
        synchronize(torch.device(device))  # raises where the device itself is lost
        line = str(error).partition("\n")[0] or type(error).__name__
        log.warning("no Triton kernels, torch computes, slower and without graphs: %s", line)
        return TorchOps()
    return ops


def _fuse(
    model: Any,
    shape: AttentionShape,
    ops: LayerOps,
    storage: str,
    files: MappedFiles,
    *,
    wanted: bool,
) -> tuple[Any, Fusions]:
    if not wanted:
        return model, Fusions(False, 0, "switched off")
    if model.dtype is not torch.float32 and not is_gpu(model.device):
        return model, Fusions(False, 0, f"{dtype_name(model.dtype)} runs as transformers wrote it")
    layout = KVLayout(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=PROOF_BLOCK_SIZE,
        dtype=dtype_name(model.dtype),
    )
    try:
        return fuse(model, shape.calls, layout, ops, Linears(ops, storage), files)
    except OverflowError as error:
        raise ConfigError(f"--weight-dtype {storage}: {error}; use bfloat16") from error


def _make_invariant(model: FusedDecoder) -> None:
    """The vendor's products choose another order of additions for other numbers of rows."""
    from kernels.triton_matmul import linear_invariant_triton

    for layer in model.linears():
        if isinstance(layer, PlainLinear):
            layer.make_invariant(linear_invariant_triton)


def _kernels(ops: LayerOps, fusions: Fusions, obstacle: str) -> str:
    """What computes, as the numerics fingerprint names it."""
    fused = "+fused" if fusions.decoder else ""
    narrow = "" if fusions.storage == "float32" else f"+{fusions.storage}-weights"
    return f"{ops.name}{fused}{narrow}{'' if obstacle else '+deterministic'}"


def _to_device(model: Any, device: str) -> Any:
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the weights do not fit on {device}: {first_line(error)}; end what else runs there, "
            "take a smaller model, or --device cpu"
        ) from error
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device} cannot be used: {first_line(error)}") from error
