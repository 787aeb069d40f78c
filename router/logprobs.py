"""Tokens and their logprobs in OpenAI's two schemas, and prompt logprobs in vLLM's.

A token that is only a part of a character cannot be spelled in JSON; it is named by its bytes, as
in OpenAI's own answers: `\\xf0\\x9f` in chat, `bytes:\\xf0\\x9f` in completions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from router.choice_text import Told
from router.tokenizer import Tokenizer
from wire.logprobs import TokenLogprobs, unpack

LOWEST = -9999.0  # OpenAI's word for a probability of zero, which JSON cannot say


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written in an answer."""

    tokenizer: Tokenizer
    as_ids: bool = False
    bytes_prefix: str = ""

    def name(self, token: int) -> str:
        if self.as_ids:
            return f"token_id:{token}"
        data = self.tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return self.bytes_prefix + "".join(f"\\x{byte:02x}" for byte in data)

    def bytes(self, token: int) -> list[int]:
        return list(self.tokenizer.token_bytes(token))


def completion_logprobs(
    told: Iterable[Told], names: TokenNames, num_top: int, offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; `offset` is that of its text in the whole answer."""
    tokens, logprobs, tops, offsets = [], [], [], []
    for item in told:
        tokens.append(names.name(item.token))
        offsets.append(offset + item.offset)
        row = unpack(item.row) if item.row else None
        logprobs.append(_json(row.logprob) if row else None)
        tops.append(_best_by_name(item.token, row, names, num_top) if row else None)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _best_by_name(
    token: int, row: TokenLogprobs, names: TokenNames, num_top: int
) -> dict[str, float]:
    """The best, and the token itself if it is not among them."""
    best: dict[str, float] = {}
    for other, logprob in (*row.top[:num_top], (token, row.logprob)):
        best.setdefault(names.name(other), _json(logprob))
    return best


def chat_logprobs(told: Iterable[Told], names: TokenNames, num_top: int) -> dict[str, Any]:
    """`logprobs` of a chat choice."""
    content = []
    for item in told:
        if item.row:
            row = unpack(item.row)
            entry = _chat_entry(item.token, row.logprob, names)
            entry["top_logprobs"] = [_chat_entry(t, lp, names) for t, lp in row.top[:num_top]]
            content.append(entry)
    return {"content": content, "refusal": None}


def _chat_entry(token: int, logprob: float, names: TokenNames) -> dict[str, Any]:
    return {"token": names.name(token), "logprob": _json(logprob), "bytes": names.bytes(token)}


def prompt_logprobs(
    tokens: Sequence[int], rows: Sequence[bytes], names: TokenNames, num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: by token id, the best and the prompt's own; none for the first."""
    told: list[dict[str, Any] | None] = [None]
    for token, data in zip(tokens[1:], rows, strict=True):
        row = unpack(data)
        best = [(id, lp, rank) for rank, (id, lp) in enumerate(row.top[:num_top], start=1)]
        entries = {
            str(id): {"logprob": _json(lp), "rank": rank, "decoded_token": names.name(id)}
            for id, lp, rank in [(token, row.logprob, row.rank), *best]
        }
        told.append(entries)
    return told


def cumulative(told: Iterable[Told]) -> float:
    """The log-probability of all these tokens in a row."""
    return sum(unpack(item.row).logprob for item in told if item.row)


def _json(logprob: float) -> float:
    return max(logprob, LOWEST)
