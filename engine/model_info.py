"""What the rest of the engine needs to know of a loaded model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.fused_modules import Fusions
from engine.numerics import dtype_name
from kernels.ops import LayerOps
from wire.errors import ConfigError
from wire.layout import KVLayout

MIN_MODEL_LEN = 8  # the probe's requests must fit


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that was checked and probed, in evaluation mode, with Baton's attention."""

    model: Any  # transformers.PreTrainedModel, or what takes the same call (see engine.fusing)
    config: Any  # transformers.PreTrainedConfig
    name: str
    architecture: str
    dtype: torch.dtype
    device: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # of config.json and every byte of the weights
    numerics: str  # nodes with equal text compute equal bits
    ops: LayerOps
    fusions: Fusions
    not_deterministic: str  # why logits may depend on a step's other rows; empty: they do not
    num_weight_bytes: int
    unexpected_tensors: tuple[str, ...]  # in the files, not in the model: ignored
    can_embed: bool  # the states that its head is given can be had

    def kv_layout(self, block_size: int) -> KVLayout:
        return KVLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype_name(self.dtype),
        )


def resolve_max_model_len(config: Any, requested: int | None) -> int | None:
    """The longest context to serve: what was asked for, if the model can; else all that it can.

    None where nothing was asked for and the config names no limit.
    """
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None:
        limit = int(limit * _stretch(text))
    length = limit if requested is None else requested
    if length is None:
        return None
    if limit is not None and length > limit:
        raise ConfigError(f"--max-model-len {length} is more than the model's {limit} positions")
    if length < MIN_MODEL_LEN:
        raise ConfigError(f"--max-model-len {length} is too short; at least {MIN_MODEL_LEN}")
    return length


def _stretch(config: Any) -> float:
    """Dynamic scaling goes beyond `max_position_embeddings`; every other kind counts it in."""
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("factor", 1.0)) if rope.get("rope_type") == "dynamic" else 1.0


def eos_token_ids(config: Any, folder: Path) -> tuple[int, ...]:
    """End-of-sequence tokens; generation_config.json decides where it names any."""
    generation: Any = {}
    if (file := folder / "generation_config.json").is_file():
        try:
            generation = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON: {error}") from error
    text = config.get_text_config(decoder=True)
    ids = generation.get("eos_token_id")
    if ids is None:
        ids = getattr(text, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)
