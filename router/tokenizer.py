"""The model's tokenizer without transformers: text to tokens, chat to tokens, tokens to text.

Long texts are tokenized in a thread (`encode_batch` releases the interpreter's lock, `encode` does
not), so that no stream waits for somebody else's prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from router.api import ChatMessage
from router.chat_template import ChatTemplate, special_tokens, template_source
from router.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from router.errors import bad_request
from wire.errors import ConfigError
from wire.messages import TokenizerFiles

INLINE_CHARS = 2_000
"""Texts up to this length take less time to tokenize than to hand to a thread and back."""


class Tokenizer:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: RustTokenizer, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._byte_table = _byte_table(tokenizer) if _is_byte_level(tokenizer) else None

    async def encode(self, text: str) -> list[int]:
        """Tokens of a plain prompt, with the special tokens that the tokenizer adds."""
        return await self._encode(text, add_special_tokens=True)

    async def encode_chat(self, messages: list[ChatMessage]) -> list[int]:
        """Tokens of a conversation; the template writes the special tokens. Raises ApiError."""
        if self._template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "messages")
        text = self._template.render(messages)
        return await self._encode(text, add_special_tokens=False)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if len(text) <= INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    def _encode_now(self, text: str, add_special_tokens: bool) -> list[int]:
        encoded = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return list(encoded[0].ids)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """For the output that follows `prompt`; special tokens are skipped."""
        if self._byte_table is not None:
            return ByteDetokenizer(self._byte_table)
        return WindowDetokenizer(self._decode, prompt)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def load_tokenizer(path: Path) -> Tokenizer:
    """From a model's folder or its tokenizer.json. Raises ConfigError."""
    folder = path if path.is_dir() else path.parent
    main = folder / "tokenizer.json" if path.is_dir() else path
    try:
        files = TokenizerFiles(
            tokenizer_json=main.read_bytes(),
            tokenizer_config_json=_read_optional(folder / "tokenizer_config.json"),
            chat_template=_read_optional(folder / "chat_template.jinja"),
        )
    except OSError as error:
        raise ConfigError(f"cannot read the tokenizer {main}: {error.strerror}") from error
    return tokenizer_from_files(files, str(main))


def tokenizer_from_files(files: TokenizerFiles, origin: str) -> Tokenizer:
    """From the files' content. Raises ConfigError that names `origin`."""
    try:
        tokenizer = RustTokenizer.from_buffer(files.tokenizer_json)
        config = json.loads(files.tokenizer_config_json or b"{}")
        source = template_source(config, files.chat_template)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ConfigError(f"not a tokenizer: {origin}: {error}") from error
    template = None if source is None else ChatTemplate(source, special_tokens(config))
    return Tokenizer(tokenizer, template)


def _read_optional(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _is_byte_level(tokenizer: RustTokenizer) -> bool:
    if tokenizer.decoder is None:
        return False
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]


def _byte_table(tokenizer: RustTokenizer) -> list[bytes]:
    """Bytes of every token; none for special tokens and for ids without a token."""
    byte_of = _byte_of_character()
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    table = [b""] * (1 + max(tokenizer.get_vocab().values(), default=-1))
    for text, token in tokenizer.get_vocab().items():
        if token not in special:
            table[token] = _token_bytes(text, byte_of)
    return table


def _token_bytes(text: str, byte_of: dict[str, int]) -> bytes:
    try:
        return bytes([byte_of[character] for character in text])
    except KeyError:  # an added token, spelled as itself
        return text.encode()


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}
