"""Makes a decode node's speculation from its config."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.drafting.config import HEADS, SpeculativeConfig
from engine.drafting.control import Controller
from engine.drafting.draft_model import DraftModel
from engine.drafting.drafter import Drafter
from engine.drafting.head import DraftHead
from engine.drafting.head_drafter import HeadDrafter
from engine.drafting.head_loader import load_head
from engine.drafting.ngram import NgramDrafter
from engine.drafting.speculation import Speculation
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.runner import ModelRunner
from engine.sampler import Sampler
from node.config import NodeConfig
from wire.errors import BatonError, ConfigError
from wire.layout import KVLayout

Progress = Callable[[str, int, int], None]
Prepare = Callable[[ModelRunner, LoadedModel, KVStore], None]
"""Makes a runner ready for its first step; no request has the last block of its store."""


def load_drafter(
    config: NodeConfig,
    model: LoadedModel,
    check_size: Callable[[int, str], None],
    progress: Progress,
) -> LoadedModel | None:
    """The model, or the head, that drafts for `model`, if one does.

    Raises ConfigError with what to do.
    """
    method = config.speculative.method
    if method in HEADS:
        return _load_head(method, config, model, check_size, progress)
    if method == "draft_model":
        return load_draft_model(config, check_size, progress)
    return None


def _load_head(
    method: str,
    config: NodeConfig,
    model: LoadedModel,
    check_size: Callable[[int, str], None],
    progress: Progress,
) -> LoadedModel:
    folder = config.speculative.model or config.model
    _check_folder(folder)
    if (folder / "tokenizer.json").is_file():
        _check_vocabulary(config.model, folder)
    try:
        return load_head(method, folder, model, check_size=check_size, progress=progress)
    except BatonError as error:
        raise ConfigError(f"--speculative-config: {error}") from error


def load_draft_model(
    config: NodeConfig, check_size: Callable[[int, str], None], progress: Progress
) -> LoadedModel:
    """Another model that drafts. Raises ConfigError with what to do."""
    folder = config.speculative.model
    assert folder is not None, "the config has checked that"
    _check_folder(folder)
    _check_vocabulary(config.model, folder)
    try:
        return load_model(
            folder,
            dtype=config.dtype,
            device=config.device,
            check_size=check_size,
            progress=progress,
        )
    except BatonError as error:
        raise ConfigError(f"--speculative-config: the draft model: {error}") from error


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--speculative-config: there is no model folder {str(folder)!r}")


def _check_vocabulary(model: Path, draft: Path) -> None:
    """Refuse a draft model whose token ids mean something else."""
    ours, theirs = _vocabulary(model), _vocabulary(draft)
    if ours != theirs:
        raise ConfigError(
            f"--speculative-config: {draft} has another vocabulary ({len(theirs)} tokens) than "
            f"{model} ({len(ours)}); take a draft model with the same tokenizer"
        )


def _vocabulary(folder: Path) -> dict[str, int]:
    """Ids by token, those added to the tokenizer's own included."""
    path = folder / "tokenizer.json"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        tokens = content["model"]["vocab"]
        named = tokens.items() if isinstance(tokens, dict) else _unigrams(tokens)
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        return {**dict(named), **added}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"--speculative-config: {path} cannot be read: {error!r:.200}") from error


def _unigrams(tokens: list[Any]) -> list[tuple[str, int]]:
    """Of a unigram model: [token, score] in the order of their ids."""
    return [(token, number) for number, (token, _) in enumerate(tokens)]


def draft_layout(draft: LoadedModel | None, block_size: int) -> KVLayout | None:
    return None if draft is None else draft.kv_layout(block_size)


def beside_drafts(num_blocks: int, layout: KVLayout, drafts: KVLayout | None) -> int:
    """How many of so many blocks fit in their memory with as many of the draft model."""
    if drafts is None:
        return num_blocks
    return num_blocks * layout.block_bytes // (layout.block_bytes + drafts.block_bytes)


def make_speculation(
    config: NodeConfig,
    model: LoadedModel,
    draft: LoadedModel | None,
    num_blocks: int,
    prepare: Prepare | None = None,
) -> Speculation | None:
    """None where nobody drafts.

    Args:
        prepare: a draft model's runner, on a GPU.
    """
    drafter = _make_drafter(config.speculative, draft, num_blocks, config.block_size, prepare)
    if drafter is None:
        return None
    most = config.speculative.num_speculative_tokens
    controller = Controller(most, drafter.cost_per_token)
    return Speculation(drafter, controller, vocab_size=model.vocab_size, clock=time.perf_counter)


def _make_drafter(
    config: SpeculativeConfig,
    draft: LoadedModel | None,
    num_blocks: int,
    block_size: int,
    prepare: Prepare | None,
) -> Drafter | None:
    if config.method == "ngram":
        return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
    if draft is None:
        return None
    extra = 1 if prepare else 0  # a block for what padding rows write
    store = KVStore(draft.kv_layout(block_size), num_blocks + extra, draft.device)
    runner = ModelRunner(draft, store)
    sampler = Sampler(frozenset(draft.eos_token_ids), draft.ops)
    if isinstance(draft.model, DraftHead):
        return HeadDrafter(
            config.method,
            draft.model,
            runner,
            sampler,
            num_blocks=num_blocks,
            block_size=block_size,
        )
    if prepare:
        prepare(runner, draft, store)
    return DraftModel(
        runner,
        sampler,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=draft.max_model_len,
    )
