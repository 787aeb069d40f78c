"""Loads a head that drafts for a loaded model, from the formats in which heads are published.

    eagle     a folder: fc, layers.0.*                      (SafeAILab's, of Llama's layers)
    eagle3    a folder: fc, midlayer.* or layers.0.*, norm, lm_head, d2t, t2d
    mtp       in the model's own folder: model.layers.N.*   (DeepSeek's), N the number of its layers

What embeds tokens, and of eagle and mtp also what gives logits, is the model's. A head that was
made for another model is refused where that can be seen; how well it drafts, only text shows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.checkpoint import Checkpoint, Progress, open_checkpoint
from engine.drafting.head import (
    DraftHead,
    Eagle3Entry,
    Eagle3Layer,
    EagleEntry,
    Lent,
    LlamaLayers,
    MtpEntry,
    PartialVocabulary,
    lent_embedding,
    lent_vocabulary,
)
from engine.drafting.head_files import HeadFiles, eagle3_name, eagle_name, mtp_name
from engine.drafting.head_probe import probe_head
from engine.final_states import layers_of
from engine.from_transformers import bars_to, check_finite, quiet
from engine.fused_modules import Fusions, ModuleFuser
from engine.model_info import LoadedModel
from engine.numerics import dtype_name
from engine.packed_linear import Linears
from engine.process_memory import MappedFiles
from engine.rope import fix_frequencies
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class _Made:
    """A head and the form of its KV."""

    head: DraftHead
    num_layers: int
    num_kv_heads: int
    head_dim: int


def load_head(
    method: str,
    folder: Path,
    target: LoadedModel,
    *,
    check_size: Callable[[int, str], None] = lambda num_bytes, dtype: None,
    progress: Progress = lambda stage, done, total: None,
) -> LoadedModel:
    """The head in `folder` for `target`; its `model` is a DraftHead. Raises ConfigError.

    Args:
        method: one of eagle, eagle3, mtp.
        check_size: as of `engine.loader.load_model`; a head in the model's files was counted there.
    """
    if not target.can_embed:
        raise ConfigError(f"{target.architecture} does not show the states that a head reads")
    checkpoint = open_checkpoint(folder)
    if method != "mtp":
        check_size(checkpoint.num_bytes, dtype_name(target.dtype))
    with quiet(), bars_to(progress):
        made = _MAKERS[method](checkpoint, target)
    head = made.head.eval().requires_grad_(requires_grad=False).to(target.device)
    check_finite(head, progress)
    fix_frequencies(head, target.max_model_len)
    num_weight_bytes = sum(p.numel() * p.element_size() for p in head.parameters())
    ModuleFuser(target.ops, Linears(target.ops), MappedFiles(())).fuse(head, "")
    loaded = replace(
        target,
        model=head,
        name=folder.name,
        architecture=method,
        num_layers=made.num_layers,
        num_kv_heads=made.num_kv_heads,
        head_dim=made.head_dim,
        fusions=Fusions(decoder=False, packed_linears=0),
        num_weight_bytes=num_weight_bytes,
        unexpected_tensors=(),
        can_embed=False,
    )
    probe_head(loaded, folder)
    return loaded


def _hidden_size(target: LoadedModel) -> int:
    return int(target.config.get_text_config(decoder=True).hidden_size)


# ---------------------------------------------------------------- eagle, eagle3


def _eagle(checkpoint: Checkpoint, target: LoadedModel) -> _Made:
    files = HeadFiles(checkpoint, eagle_name, target.dtype)
    config, width = files.llama_config(), _hidden_size(target)
    _check_vocabulary(files, target)
    if config.hidden_size != width:
        raise ConfigError(
            f"{files.folder}: the head reads states of {config.hidden_size} numbers, the model's "
            f"have {width}; take the head that was made for this model"
        )
    files.drop("embed_tokens.weight", "lm_head.weight")  # copies of the model's
    entry = EagleEntry(files.linear("fc", 2 * width, width))
    body = files.llama_body(config, {"layers.0.input_layernorm.weight"})
    files.check_all_taken()
    body.layers[0].input_layernorm = nn.Identity()
    lent = (lent_embedding(target.model), lent_vocabulary(target.model))
    head = DraftHead(entry, LlamaLayers(body), nn.Identity(), *lent)
    return _Made(head, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)


def _eagle3(checkpoint: Checkpoint, target: LoadedModel) -> _Made:
    files = HeadFiles(checkpoint, eagle3_name, target.dtype)
    config = files.llama_config()
    _check_vocabulary(files, target)
    if config.num_hidden_layers != 1:
        raise ConfigError(f"{files.folder}: an EAGLE-3 head of {config.num_hidden_layers} layers")
    layers, width = _read_layers(files, target), config.hidden_size
    entry = Eagle3Entry(files.linear("fc", len(layers) * _hidden_size(target), width))
    norm = files.rms_norm("norm", width, config.rms_norm_eps)
    embed, vocabulary = _embedding(files, target, width), _vocabulary(files, target, width)
    body = _eagle3_body(files, config)
    files.check_all_taken()
    head = DraftHead(entry, LlamaLayers(body), norm, embed, vocabulary, layers=layers)
    return _Made(head, 1, config.num_key_value_heads, config.head_dim)


def _eagle3_body(files: HeadFiles, config: Any) -> Any:
    """Llama's decoder with a layer whose attention takes twice the width."""
    at = "layers.0.self_attn"
    num_heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
        "v_proj": config.num_key_value_heads,
    }
    wide = {
        name: files.linear(f"{at}.{name}", 2 * config.hidden_size, heads * config.head_dim)
        for name, heads in num_heads.items()
    }
    hidden_norm = files.rms_norm("layers.0.hidden_norm", config.hidden_size, config.rms_norm_eps)
    body = files.llama_body(config, {f"{at}.{name}.weight" for name in wide})
    layer = body.layers[0]
    for name, linear in wide.items():
        setattr(layer.self_attn, name, linear)
    keeps_normed = bool(files.setting("norm_before_residual"))
    body.layers[0] = Eagle3Layer(layer, hidden_norm, keeps_normed=keeps_normed)
    return body


def _check_vocabulary(files: HeadFiles, target: LoadedModel) -> None:
    theirs = files.config.get("vocab_size")
    if theirs != target.vocab_size:
        raise ConfigError(
            f"{files.folder}: the head is for {theirs} tokens, the model has {target.vocab_size}; "
            "take the head that was made for this model"
        )


def _read_layers(files: HeadFiles, target: LoadedModel) -> tuple[int, ...]:
    """Of the target, whose inputs the head reads."""
    have, named = layers_of(target.model), files.setting("eagle_aux_hidden_state_layer_ids")
    if have is None:
        raise ConfigError(f"{target.architecture} does not show its layers, which eagle3 reads")
    ids = named or [2, len(have) // 2, len(have) - 3]
    if sorted(set(ids)) != list(ids) or not all(0 <= i < len(have) for i in ids):
        raise ConfigError(
            f"{files.folder}: the head reads the layers {ids}, the model has {len(have)}; give "
            "eagle_aux_hidden_state_layer_ids in its config.json, in order"
        )
    return tuple(ids)


def _embedding(files: HeadFiles, target: LoadedModel, width: int) -> Lent | nn.Embedding:
    """The head's own where it has one."""
    if "embed_tokens.weight" not in files:
        if width != _hidden_size(target):
            raise ConfigError(f"{files.folder}: the head's tensor embed_tokens.weight is missing")
        return lent_embedding(target.model)
    weight = files.take("embed_tokens.weight", target.vocab_size, width)
    return nn.Embedding(target.vocab_size, width, _weight=weight)


def _vocabulary(files: HeadFiles, target: LoadedModel, width: int) -> PartialVocabulary:
    size = int(files.setting("draft_vocab_size") or target.vocab_size)
    head = files.linear("lm_head", width, size)
    files.drop("t2d")  # says the same as d2t
    ids = torch.arange(size)
    if size != target.vocab_size or "d2t" in files:
        ids = ids + files.take("d2t", size)
    if not bool(((ids >= 0) & (ids < target.vocab_size)).all()):
        raise ConfigError(f"{files.folder}: d2t names tokens that the model does not have")
    return PartialVocabulary(head, ids, target.vocab_size)


# ---------------------------------------------------------------- mtp


def _mtp(checkpoint: Checkpoint, target: LoadedModel) -> _Made:
    """Of several such layers the first drafts all tokens, one by one."""
    config = target.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_mtp_layers", getattr(config, "num_nextn_predict_layers", 0))
    if not num_heads:
        raise ConfigError(
            f"{checkpoint.folder} has no layers that predict next tokens "
            "(num_nextn_predict_layers in its config.json); take another method"
        )
    files = HeadFiles(checkpoint, mtp_name(config.num_hidden_layers), target.dtype)
    files.drop("shared_head.head.weight", "embed_tokens.weight")  # copies of the model's
    width, eps = config.hidden_size, config.rms_norm_eps
    norms = [files.rms_norm(name, width, eps) for name in ("enorm", "hnorm", "shared_head.norm")]
    entry = MtpEntry(norms[0], norms[1], files.linear("eh_proj", 2 * width, width))
    body = files.body(_one_layer(config))
    files.check_all_taken()
    lent = (lent_embedding(target.model), lent_vocabulary(target.model))
    head = DraftHead(entry, body, norms[2], *lent, chains_normed=True)
    return _Made(head, 1, target.num_kv_heads, target.head_dim)


def _one_layer(config: Any) -> Any:
    """The target's config, for a decoder of one layer of the kind that predicts."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if hasattr(config, "first_k_dense_replace"):
        config.first_k_dense_replace = 0  # it is never one of the first, dense ones
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = (getattr(config, "mtp_layer_types", None) or ["full_attention"])[:1]
    return config


_MAKERS: dict[str, Callable[[Checkpoint, LoadedModel], _Made]] = {
    "eagle": _eagle,
    "eagle3": _eagle3,
    "mtp": _mtp,
}
