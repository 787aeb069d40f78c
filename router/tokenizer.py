"""The model's tokenizer without transformers: text to tokens, chat to tokens, tokens to text.

Long texts are tokenized in a thread (`encode_batch` releases the interpreter's lock, `encode` does
not), so that no stream waits for somebody else's prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from router.api_chat import ChatMessage
from router.chat_template import (
    PLAIN,
    ChatOptions,
    ChatTemplate,
    requested_template,
    special_tokens,
    template_source,
)
from router.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from router.errors import bad_request
from router.token_bytes import (
    byte_table,
    is_byte_level,
    piece_bytes,
    special_ids,
    without_special,
)
from wire.errors import ConfigError
from wire.fleet_messages import TokenizerFiles

INLINE_CHARS = 2_000
"""Texts up to this length take less time to tokenize than to hand to a thread and back."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens, and for each 1 if the tokenizer added it, 0 if the text has it."""

    ids: list[int]
    added: list[int]


class Tokenizer:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: RustTokenizer, template: ChatTemplate | None) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._special = special_ids(tokenizer)
        self._byte_table = byte_table(tokenizer) if is_byte_level(tokenizer) else None
        self._plain_table = self._byte_table and without_special(self._byte_table, self._special)

    async def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        """Tokens of a plain prompt, with the special tokens that the tokenizer adds."""
        if len(text) <= INLINE_CHARS:
            return self._encode_now(text, add_special_tokens)
        return await asyncio.to_thread(self._encode_now, text, add_special_tokens)

    async def encode_chat(
        self, messages: list[ChatMessage], options: ChatOptions = PLAIN
    ) -> list[int]:
        """Tokens of a conversation; the template writes the special tokens. Raises ApiError."""
        template = self._template
        if options.template is not None:
            template = requested_template(options.template, template)
        if template is None:
            raise bad_request("This model has no chat template; use /v1/completions.", "messages")
        text = template.render(messages, options)
        return (await self.encode(text, options.add_special_tokens)).ids

    @property
    def template_source(self) -> str:
        """The model's chat template; empty if it has none."""
        return "" if self._template is None else self._template.source

    def _encode_now(self, text: str, add_special_tokens: bool) -> Encoded:
        [encoded] = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
        return Encoded(list(encoded.ids), list(encoded.special_tokens_mask))

    def detokenizer(self, prompt: Sequence[int], skip_special_tokens: bool = True) -> Detokenizer:
        """For the output that follows `prompt`."""
        table = self._plain_table if skip_special_tokens else self._byte_table
        if table is not None:
            return ByteDetokenizer(table)
        return WindowDetokenizer(partial(self._decode, skip_special_tokens), prompt)

    def _decode(self, skip_special_tokens: bool, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token: int) -> bytes:
        """What `token` alone stands for; perhaps a part of a character. Empty if there is none."""
        if self._byte_table is not None:
            return self._byte_table[token] if token < len(self._byte_table) else b""
        return piece_bytes(self._tokenizer, token)

    def is_special(self, text: str) -> bool:
        """Whether `text` is one token that grammars of text cannot speak of."""
        token = self._tokenizer.token_to_id(text)
        return token is not None and token in self._special

    def token_name(self, token: int) -> str:
        """How the vocabulary spells `token`."""
        return self._tokenizer.id_to_token(token) or ""


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
