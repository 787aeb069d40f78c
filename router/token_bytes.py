"""The bytes that single tokens stand for: of text, of logprobs, and of half characters."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_PIECE = "\u2581"  # SentencePiece's mark for a space


def is_byte_level(tokenizer: RustTokenizer) -> bool:
    """Whether every token is a fixed string of bytes (GPT-2, Llama 3, Qwen, …)."""
    if tokenizer.decoder is None:
        return False
    decoder: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [part["type"] for part in parts] == ["ByteLevel"]


def special_ids(tokenizer: RustTokenizer) -> set[int]:
    """Tokens that are not text: end of text, turns of a chat, and the like."""
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}


def byte_table(tokenizer: RustTokenizer) -> list[bytes]:
    """Bytes of every token, special ones spelled out; none for ids without a token."""
    byte_of = _byte_of_character()
    table = [b""] * (1 + max(tokenizer.get_vocab().values(), default=-1))
    special = special_ids(tokenizer)
    for text, token in tokenizer.get_vocab().items():
        table[token] = text.encode() if token in special else _token_bytes(text, byte_of)
    return table


def without_special(table: list[bytes], special: set[int]) -> list[bytes]:
    """The table for text that leaves special tokens out."""
    return [b"" if token in special else data for token, data in enumerate(table)]


def piece_bytes(tokenizer: RustTokenizer, token: int) -> bytes:
    """Bytes of a SentencePiece-like token: a byte piece, or words with a mark for the space."""
    piece = tokenizer.id_to_token(token)
    if piece is None:
        return b""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE_PIECE, " ").encode()


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
