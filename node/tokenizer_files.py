"""Reads the tokenizer's files, which a node gives to its router."""

from __future__ import annotations

import json
from pathlib import Path

from wire.errors import ConfigError
from wire.fleet_messages import TokenizerFiles


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer's files for a router. Raises ConfigError if it could not use them."""
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json; save the model with a fast tokenizer")
    return TokenizerFiles(
        _read(folder / "tokenizer.json", 64 << 20),
        _tokenizer_config(folder / "tokenizer_config.json"),
        _read(folder / "chat_template.jinja", 1 << 20),
    )


def _tokenizer_config(path: Path) -> bytes:
    data = _read(path, 8 << 20) or b"{}"
    try:
        json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return data


def _read(path: Path, limit: int) -> bytes:
    """The file's content, empty where there is none; `limit` is the message's (TokenizerFiles)."""
    if not path.is_file():
        return b""
    if path.stat().st_size > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes; no tokenizer needs that")
    return path.read_bytes()
