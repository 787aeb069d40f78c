"""What a model folder's files tell without loading it: whether they are whole, sizes, KV bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint import open_checkpoint
from node.devices import is_gpu
from wire.errors import ConfigError
from wire.layout import DTYPE_BYTES, KVLayout

# The config's own names first, then those of older architectures.
NUM_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
NUM_HEADS = ("num_attention_heads", "n_head", "num_heads")
NUM_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
WIDTH = ("hidden_size", "n_embd", "d_model")
MAX_LEN = ("max_position_embeddings", "n_positions", "n_ctx")


def report_on(folder: Path, *, has_bf16_units: bool, device: str = "cpu") -> dict[str, Any]:
    """Check a model folder by its headers; what `--dtype auto` makes of it on `device`.

    Raises:
        ConfigError: it cannot be loaded; the text names file and tensor.
    """
    checkpoint = open_checkpoint(folder)
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise ConfigError(f"{checkpoint.folder} has no tokenizer.json; the router needs it")
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    stored = stored_dtype(checkpoint.config, text_config)
    dtype = choose_dtype(stored, has_bf16_units=has_bf16_units, device=device)
    return {
        "folder": str(checkpoint.folder),
        "architecture": ", ".join(checkpoint.config.get("architectures") or []) or None,
        "weight_files": f"{len(checkpoint.files)}, complete by their headers",
        "weight_file_bytes": checkpoint.num_bytes,
        "stored_dtype": stored,
        "dtype": dtype,
        "weight_bytes_in_memory": checkpoint.num_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES[stored],
        "kv_bytes_per_token": kv_bytes_per_token(text_config, dtype),
        "max_model_len": _first(text_config, MAX_LEN),
    }


def report_on_loaded(folder: Path, device: str) -> dict[str, Any]:
    """What only loading tells. Raises ConfigError or UnsupportedModelError where that fails."""
    from engine.loader import load_model  # torch and transformers: seconds

    loaded = load_model(folder, device=device)
    return {
        "fusions": str(loaded.fusions),
        "operations": loaded.ops.name,
        "deterministic": f"no, {why}" if (why := loaded.not_deterministic) else "yes",
        "numerics": loaded.numerics,
    }


def choose_dtype(stored: str, *, has_bf16_units: bool, device: str = "cpu") -> str:
    """What `--dtype auto` computes in: on a CPU bfloat16 only if stored so and fast here.

    On a GPU always 16 bits; one that is too old for bfloat16 takes float16 instead.
    """
    if is_gpu(device):
        return "float16" if stored == "float16" else "bfloat16"
    return "bfloat16" if stored == "bfloat16" and has_bf16_units else "float32"


def stored_dtype(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> str:
    """The checkpoint's dtype as its config names it; float32 where it does not."""
    named = (part.get(key) for part in (config, text_config) for key in ("dtype", "torch_dtype"))
    found = next((str(name) for name in named if name), "float32")
    return found if found in DTYPE_BYTES else "float32"


def kv_bytes_per_token(config: Mapping[str, Any], dtype: str) -> int | None:
    """Bytes that one token's keys and values take in all layers; None if the config is unusual."""
    num_layers, num_heads = _first(config, NUM_LAYERS), _first(config, NUM_HEADS)
    width = _first(config, WIDTH)
    if num_layers is None or num_heads is None or width is None:
        return None
    num_kv_heads = _first(config, NUM_KV_HEADS) or num_heads
    head_dim = _first(config, ("head_dim",)) or width // num_heads
    return KVLayout(num_layers, num_kv_heads, head_dim, 1, dtype).bytes_per_token


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of the entries that is a number."""
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
