"""The files of a head: its config, and its tensors, of which none may be missing or left over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import PAGED
from engine.checkpoint import Checkpoint
from engine.from_transformers import first_line
from wire.errors import ConfigError

LIKE_LLAMA = ("llama", "mistral", "qwen2")
"""Kinds of config whose layers are Llama's; where a head's are not, its tensors show it."""
LLAMA_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "mlp_bias"),
)
COMPUTED = "rotary_emb.inv_freq"  # older files have it as a tensor

Rename = Callable[[str], str | None]
"""From a file's name of a tensor to the one that is used here; None: it is not the head's."""


def eagle_name(name: str) -> str:
    return name.removeprefix("model.")


def eagle3_name(name: str) -> str:
    """Its layer is `midlayer` with the authors, and layer 0 with others."""
    name = name.removeprefix("model.")
    if name.startswith("midlayer."):
        return name.replace("midlayer.", "layers.0.", 1)
    return name


def mtp_name(layer: int) -> Rename:
    """It is a layer behind the model's own, with more in it."""
    prefix = f"model.layers.{layer}."

    def rename(name: str) -> str | None:
        if not name.startswith(prefix):
            return None
        name = name.removeprefix(prefix)
        own = name.startswith(("enorm.", "hnorm.", "eh_proj.", "shared_head.", "embed_tokens."))
        return name if own else f"layers.0.{name}"

    return rename


class HeadFiles:
    """A head's config and tensors, these in the dtype that it computes in.

    What is wrong raises ConfigError, in one line.
    """

    def __init__(self, checkpoint: Checkpoint, rename: Rename, dtype: torch.dtype) -> None:
        self.folder = checkpoint.folder
        self._whole = dict(checkpoint.config)
        self.config = _layer_config(self._whole)
        self._dtype = dtype
        self._tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in _read(checkpoint, rename)
            if not name.endswith(COMPUTED)
        }

    def setting(self, name: str) -> Any:
        """A field of the head's, wherever its makers put it; None where there is none."""
        places = (self._whole.get("eagle_config"), self._whole, self.config)
        found = (place[name] for place in places if isinstance(place, dict) and name in place)
        return next(found, None)

    # ------------------------------------------------------------ tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, *shape: int) -> Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            raise ConfigError(f"{self.folder}: the head's tensor {name} is missing")
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{self.folder}: the head's tensor {name} has shape {list(tensor.shape)}, not "
                f"{list(shape)}; it is of another model, or config.json of another head"
            )
        return tensor

    def drop(self, *names: str) -> None:
        """They are not needed."""
        for name in names:
            self._tensors.pop(name, None)

    def linear(self, name: str, num_in: int, num_out: int) -> nn.Linear:
        """With a bias where the files have one."""
        has_bias = f"{name}.bias" in self
        layer = nn.Linear(num_in, num_out, bias=has_bias, device="meta")
        layer.weight = nn.Parameter(self.take(f"{name}.weight", num_out, num_in))
        if has_bias:
            layer.bias = nn.Parameter(self.take(f"{name}.bias", num_out))
        return layer

    def rms_norm(self, name: str, width: int, eps: float) -> nn.Module:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        norm: nn.Module = LlamaRMSNorm(width, eps=eps)
        norm.weight = nn.Parameter(self.take(f"{name}.weight", width))
        return norm

    def check_all_taken(self) -> None:
        if self._tensors:
            raise ConfigError(
                f"{self.folder}: {len(self._tensors)} of the head's tensors are of no known form, "
                f"first {min(self._tensors)}"
            )

    # ------------------------------------------------------------ layers

    def llama_config(self) -> Any:
        """Of layers of Llama's kind."""
        from transformers import LlamaConfig

        kind = self.config.get("model_type", "llama")
        if kind not in LIKE_LLAMA:
            raise ConfigError(
                f"{self.folder}: a head with layers of {kind} is not supported, only of Llama's"
            )
        fields = {name: self.config[name] for name in LLAMA_FIELDS if name in self.config}
        config = LlamaConfig.from_dict(fields)
        config.attention_bias = any(".self_attn." in n and n.endswith(".bias") for n in self)
        return config

    def llama_body(self, config: Any, without: Collection[str]) -> Any:
        """Llama's decoder of the layers in the files, `without` these tensors."""
        biases = {
            f"layers.{i}.self_attn.{name}.bias"
            for i in range(config.num_hidden_layers)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        } - set(self)
        body = self.body(config, {*without, *biases})
        for layer in body.layers:
            for name, linear in layer.self_attn.named_children():
                if f"layers.{layer.self_attn.layer_idx}.self_attn.{name}.bias" in biases:
                    linear.bias = None
        return body

    def body(self, config: Any, without: Collection[str] = ()) -> Any:
        """The decoder that transformers makes for `config`, with nothing before or behind it."""
        from transformers.models.auto.modeling_auto import MODEL_MAPPING

        config.vocab_size, config.pad_token_id = 1, None  # it is given states, not tokens
        layers = {name: t for name, t in self._tensors.items() if name.startswith("layers.")}
        self.drop(*layers)
        try:
            body, info = MODEL_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=layers,
                dtype=self._dtype,
                attn_implementation=PAGED,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                output_loading_info=True,
            )
        except Exception as error:  # whatever transformers thinks of foreign tensors
            raise ConfigError(
                f"{self.folder}: the head cannot be loaded: {first_line(error)}"
            ) from error
        self._check_loaded(info, {"embed_tokens.weight", "norm.weight", *without})
        body.norm = nn.Identity()
        return body

    def _check_loaded(self, info: Any, without: Collection[str]) -> None:
        for name, stored, wanted in sorted(info["mismatched_keys"]):
            raise ConfigError(
                f"{self.folder}: the head's tensor {name} has shape {list(stored)}, the config "
                f"wants {list(wanted)}"
            )
        if missing := sorted(set(info["missing_keys"]) - set(without)):
            raise ConfigError(f"{self.folder}: the head's tensor {missing[0]} is missing")
        if unknown := sorted(info["unexpected_keys"]):
            raise ConfigError(
                f"{self.folder}: {len(unknown)} of the head's tensors are of no known form, "
                f"first {unknown[0]}"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)


def _layer_config(whole: dict[str, Any]) -> dict[str, Any]:
    """The part of a head's config that describes its layers, which some formats wrap."""
    for name in ("transformer_layer_config", "model"):
        if isinstance(whole.get(name), dict):
            return dict(whole[name])
    return whole


def _read(checkpoint: Checkpoint, rename: Rename) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in checkpoint.files:
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 - it is no mapping
                renamed = rename(name)
                if renamed is not None:
                    yield renamed, stream.get_tensor(name)
