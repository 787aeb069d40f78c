"""What a node says of a draft model that it cannot use: one line, before anything is served."""

from __future__ import annotations

import json
import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest

from baton.bundled_model import BUNDLED, DEFAULT_MODEL
from engine.drafting.config import SpeculativeConfig
from engine.plan import DraftCounts, StepResult
from node.build import build_engine
from node.config import NodeConfig
from node.drafting import beside_drafts, load_draft_model
from node.flags import add_arguments, add_decode_arguments, from_args
from node.stats import NodeStats
from wire.errors import ConfigError
from wire.layout import KVLayout
from wire.types import Role

DRAFT = BUNDLED / "baton-draft"


def config_of(model: Path, **settings: Any) -> NodeConfig:
    speculative = SpeculativeConfig("draft_model", model)
    return NodeConfig(DEFAULT_MODEL, "node", speculative=speculative, **settings)


def load(config: NodeConfig) -> None:
    load_draft_model(config, lambda num_bytes, dtype: None, lambda stage, done, total: None)


def refused(config: NodeConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config)
    assert "--speculative-config" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copied(folder: Path) -> Path:
    shutil.copytree(DRAFT, folder)
    return folder


def test_another_vocabulary(tmp_path: Path) -> None:
    folder = copied(tmp_path / "draft")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "has another vocabulary" in refused(config_of(folder))


def test_what_is_missing(tmp_path: Path) -> None:
    assert "there is no model folder" in refused(config_of(tmp_path / "nowhere"))
    folder = copied(tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    assert "the draft model" in refused(config_of(folder))
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json cannot be read" in refused(config_of(folder))


def test_too_little_memory_for_both() -> None:
    config = config_of(DRAFT, kv_memory=70_000)
    with pytest.raises(ConfigError, match="of the draft model; give more"):
        build_engine({Role.DECODE}, config, lambda stage, done, total: None)


def test_the_drafters_blocks_come_out_of_the_pools_memory() -> None:
    big = KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
    small = KVLayout(num_layers=1, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
    assert beside_drafts(100, big, None) == 100
    assert beside_drafts(100, big, small) == 80


def test_the_flag_is_decode_nodes_own() -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    add_decode_arguments(parser)
    flags = ["model", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']
    config = from_args(parser.parse_args(flags), role="decode", pid=1)
    assert config.speculative == SpeculativeConfig("ngram", num_speculative_tokens=3)
    wrong = parser.parse_args(["model", "--speculative-config", '{"method": "ngrams"}'])
    with pytest.raises(ConfigError, match="method must be one of"):
        from_args(wrong, role="decode", pid=1)


def test_what_is_counted() -> None:
    stats = NodeStats()
    counts = DraftCounts(((3, 2), (1, 0), (2, 2)), 0.5, 0.25, "it broke")
    stats.count_step(StepResult(1, (), 9, 0, speculation=counts))
    assert (stats.drafts, stats.draft_tokens, stats.accepted_at) == (3, 6, [2, 2, 0])
    assert (stats.draft_s, stats.draft_saved_s, stats.drafter_failures) == (0.5, 0.25, 1)
