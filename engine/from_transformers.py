"""What transformers reads of a model's folder, and what is wrong with it, in one line each.

transformers fills a missing tensor with random numbers and only warns; here that is an error.
Importing transformers costs seconds, so it happens inside the functions that need it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.attention import PAGED, paged_attention_forward
from engine.checkpoint import Checkpoint, Progress
from engine.probe import OBSERVED, mask_rule, observing_attention
from wire.errors import ConfigError, UnsupportedModelError

FINITE_CHUNK = 1 << 22  # elements checked at once


def read_config(checkpoint: Checkpoint) -> tuple[Any, str]:
    """The config and the architecture's name; refuses what the config alone rules out."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    listed = checkpoint.config.get("architectures") or [checkpoint.config.get("model_type")]
    architecture = str(listed[0])
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                checkpoint.folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever transformers thinks of a foreign file
        raise UnsupportedModelError(
            f"{architecture}: transformers cannot read its config: {first_line(error)}"
        ) from error
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{architecture} is an encoder-decoder; only decoders are served"
        )
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(f"{architecture} is no causal language model")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            f"{architecture}: quantized checkpoints are not supported; use the 16-bit one"
        )
    return config, architecture


def load(
    checkpoint: Checkpoint, config: Any, dtype: torch.dtype, architecture: str, progress: Progress
) -> tuple[Any, tuple[str, ...]]:
    """The model with all its tensors from the files, and names of tensors that it did not take."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

    AttentionInterface.register(PAGED, paged_attention_forward)
    AttentionInterface.register(OBSERVED, observing_attention)
    AttentionMaskInterface.register(OBSERVED, mask_rule)
    try:
        with quiet(), bars_to(progress):
            model, info = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                attn_implementation=PAGED,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, with names and shapes
                output_loading_info=True,
            )
    except KeyError as error:
        if error.args != (PAGED,):
            raise
        raise UnsupportedModelError(
            f"{architecture} cannot be served: it bypasses transformers' attention interface"
        ) from error
    except Exception as error:  # whatever transformers thinks of a foreign checkpoint
        raise ConfigError(f"{architecture} cannot be loaded: {first_line(error)}") from error
    _check_complete(checkpoint.folder, info)
    return model, tuple(sorted(info["unexpected_keys"]))


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model that would run on tensors that transformers made up."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ConfigError(
            f"{folder}: tensor {name} has shape {list(stored)}, the config wants {list(wanted)} "
            f"({len(mismatched)} such tensors); config and weights do not belong together"
        )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{folder}: {len(missing)} tensors are missing, first {missing[0]}; "
            "the checkpoint is incomplete"
        )
    if info["error_msgs"]:
        raise ConfigError(f"{folder}: {info['error_msgs'][0]}")


def check_finite(model: Any, progress: Progress) -> None:
    """Refuse NaN and infinity in weights; the sum of a chunk is finite only if all of it is."""
    named = list(model.named_parameters())
    for done, (name, tensor) in enumerate(named):
        progress("checking weights", done, len(named))
        for chunk in tensor.detach().flatten().split(FINITE_CHUNK):
            if not chunk.sum().isfinite() and not chunk.isfinite().all():
                raise ConfigError(f"tensor {name} holds NaN or infinity; the checkpoint is damaged")
    progress("checking weights", len(named), len(named))


@contextmanager
def quiet() -> Iterator[None]:
    """transformers warns of what is raised here as an error; it keeps quiet meanwhile."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def bars_to(progress: Progress) -> Iterator[None]:
    """transformers' progress bar over tensors becomes calls of `progress`; nothing is drawn."""
    from transformers.utils.logging import set_tqdm_hook

    def watch(items: Collection[Any]) -> Iterator[Any]:
        for done, item in enumerate(items):
            progress("loading weights", done, len(items))
            yield item
        progress("loading weights", len(items), len(items))

    previous = set_tqdm_hook(lambda factory, args, options: watch(args[0]))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
