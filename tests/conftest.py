"""Fixtures that tests of several packages share."""

from __future__ import annotations

import json
import logging as python_logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.config import UCX_ENVIRONMENT

os.environ.update(UCX_ENVIRONMENT)  # UCX reads it when a test loads it, or a process that it starts
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """A test that runs a program's `main` must not leave its log handlers to the others."""
    root = python_logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, 512 positions) with a byte-level tokenizer of 258 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # sharp enough that greedy output is not one token
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=True,
    )
    logging.disable_progress_bar()
    LlamaForCausalLM(config).save_pretrained(folder)
    logging.enable_progress_bar()
    _write_byte_tokenizer(folder)
    return folder


def _write_byte_tokenizer(folder: Path) -> None:
    """tokenizer.json with one token per byte, <|bos|> and <|eos|>, and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|bos|>", "<|eos|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
