"""Tokens to text, piece by piece, never with half a character.

Two ways, because tokenizers differ. With a byte-level decoder (GPT-2, Llama 3, Qwen, …) every token
is a fixed string of bytes, so an incremental UTF-8 decoder is exact and costs one table look-up.
Otherwise (SentencePiece and kin) a token's text depends on its neighbours: decode a short window
twice, with and without the new token, and show the difference once it ends with a whole character.

Text does not depend on how tokens are grouped into messages: streamed or not, it is the same.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 6
_MAX_WINDOW = 64
_MAX_HELD_TOKENS = 4  # UTF-8 has at most four bytes per character


class Detokenizer(Protocol):
    """Turns one choice's output tokens into text."""

    def push(self, tokens: Sequence[int]) -> str:
        """Text that became certain with `tokens`."""
        ...

    def flush(self) -> str:
        """What was held back, now that no token follows."""
        ...

    @property
    def holds(self) -> bool:
        """Whether a character has begun that is not whole yet."""
        ...


class ByteDetokenizer:
    """For tokenizers whose tokens are byte strings; `table[token]` is b"" for special tokens."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        table = self._table
        limit = len(table)  # the model's vocabulary may be padded beyond the tokenizer's
        return self._utf8.decode(b"".join([table[t] for t in tokens if t < limit]))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)

    @property
    def holds(self) -> bool:
        return bool(self._utf8.getstate()[0])


class WindowDetokenizer:
    """For any tokenizer: `decode` maps token ids to text, `context` is the end of the prompt.

        ids:  | context … already shown | held … new |
              0                      _read

    The window in front of `_read` gives the tokens their neighbours (a leading space, for example).
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(context[-_CONTEXT_TOKENS:])
        while self._ids and decode(self._ids).startswith(REPLACEMENT):
            del self._ids[0]  # half a character would spoil its neighbours
        self._read = len(self._ids)

    def push(self, tokens: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in tokens])

    def flush(self) -> str:
        return self._take() if self.holds else ""

    @property
    def holds(self) -> bool:
        return self._read < len(self._ids)

    def _push_one(self, token: int) -> str:
        self._ids.append(token)
        if len(self._ids) - self._read < _MAX_HELD_TOKENS and self._ends_inside_character():
            return ""
        return self._take()

    def _ends_inside_character(self) -> bool:
        return self._decode(self._ids).endswith(REPLACEMENT)

    def _take(self) -> str:
        shown = self._decode(self._ids[: self._read])
        text = self._decode(self._ids)[len(shown) :]
        if text:  # a window that shows nothing (special tokens) would not keep a leading space
            del self._ids[: self._read]
        elif len(self._ids) > _MAX_WINDOW:
            del self._ids[:-_CONTEXT_TOKENS]
        self._read = len(self._ids)
        return text
