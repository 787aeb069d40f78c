"""Heads of random numbers for tiny models, in the formats in which such heads are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.tiny_models import ARCHITECTURES, save_random_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
GLM: tuple[str, dict[str, Any]] = (
    "Glm4MoeConfig",
    {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    },
)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def _layer(prefix: str, *, width: int = 32, wide: int = 1, mlp: int = 48) -> dict[str, Tensor]:
    half = width // 2  # of four heads' queries, two heads' keys
    attention = {"q": (width, wide * width), "k": (half, wide * width), "v": (half, wide * width)}
    tensors = {f"self_attn.{n}_proj.weight": _random(*shape) for n, shape in attention.items()}
    tensors["self_attn.o_proj.weight"] = _random(width, width)
    for name in ("gate", "up"):
        tensors[f"mlp.{name}_proj.weight"] = _random(mlp, width)
    tensors["mlp.down_proj.weight"] = _random(width, mlp)
    tensors["post_attention_layernorm.weight"] = _random(width)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def save_eagle(
    folder: Path,
    *,
    num_layers: int = 1,
    bias: bool = True,
    width: int = 32,
    mlp: int = 48,
    vocab_size: int = 97,
) -> Path:
    torch.manual_seed(5)
    tensors = {"fc.weight": _random(width, 2 * width)}
    tensors["embed_tokens.weight"] = _random(vocab_size, width)
    if bias:
        tensors["fc.bias"] = _random(width)
    for layer in range(num_layers):
        tensors |= _layer(f"layers.{layer}.", width=width, mlp=mlp)
        if layer:
            tensors[f"layers.{layer}.input_layernorm.weight"] = _random(width)
    sizes = {"hidden_size": width, "intermediate_size": mlp, "vocab_size": vocab_size}
    return _write(folder, {**LLAMA, **sizes, "num_hidden_layers": num_layers}, tensors)


def save_eagle_for_bundled(folder: Path) -> Path:
    """For the model that comes with Baton."""
    return save_eagle(folder, width=256, mlp=704, vocab_size=4096)


def save_eagle3(folder: Path, layers: list[int], **changes: Any) -> Path:
    """With a vocabulary of every other token."""
    torch.manual_seed(6)
    config = {
        **LLAMA,
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": 48,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": layers},
        **changes,
    }
    ids = torch.arange(48) * 2 + 1
    tensors = {
        "fc.weight": _random(32, 32 * len(layers)),
        "norm.weight": _random(32),
        "lm_head.weight": _random(48, 32),
        "d2t": ids - torch.arange(48),
        "t2d": torch.isin(torch.arange(97), ids),
        "midlayer.hidden_norm.weight": _random(32),
        "midlayer.input_layernorm.weight": _random(32),
        **_layer("midlayer.", wide=2),
    }
    return _write(folder, config, tensors)


def add_mtp(folder: Path) -> Path:
    """Give the model in `folder` a layer that predicts: a copy of its last one, and its own parts.

    Of a model whose last layer is `model.layers.1`.
    """
    torch.manual_seed(7)
    tensors = load_file(folder / "model.safetensors")
    last = {n: t for n, t in tensors.items() if n.startswith("model.layers.1.")}
    copied = {n.replace("layers.1.", "layers.2."): _random_like(t) for n, t in last.items()}
    at = "model.layers.2."
    own = {
        f"{at}enorm.weight": _random(32),
        f"{at}hnorm.weight": _random(32),
        f"{at}eh_proj.weight": _random(32, 64),
        f"{at}shared_head.norm.weight": _random(32),
        f"{at}shared_head.head.weight": tensors["lm_head.weight"].clone(),
        f"{at}embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
    }
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 1
    return _write(folder, config, {**tensors, **copied, **own})


def _random_like(tensor: Tensor) -> Tensor:
    return _random(*tensor.shape)


def save_llama(folder: Path, **changes: Any) -> Path:
    name, known = ARCHITECTURES["llama"]
    return save_random_model(name, {**known, **changes}, folder)
