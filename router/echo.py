"""A prompt that comes back in front of its completion, and where in the text its tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.choice_text import Told
from router.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """The text of a prompt; token i begins at character `offsets[i]`."""

    text: str
    tokens: Sequence[int]
    offsets: list[int]

    def told(self, rows: Sequence[bytes]) -> list[Told]:
        """The prompt's tokens with their logprobs; the first token has none."""
        rows_or_none = [None, *rows] if rows else [None] * len(self.tokens)
        return [
            Told(token, row, offset)
            for token, row, offset in zip(self.tokens, rows_or_none, self.offsets, strict=True)
        ]


def echo_of(tokens: Sequence[int], added: Sequence[int], tokenizer: Tokenizer) -> Echo:
    """Everything that the prompt says, but nothing of the tokens that the tokenizer `added`."""
    detokenizer = tokenizer.detokenizer((), skip_special_tokens=False)
    pieces: list[str] = []
    offsets: list[int] = []
    length = 0
    for index, token in enumerate(tokens):
        offsets.append(length)
        if not (added and added[index]):
            pieces.append(detokenizer.push((token,)))
            length += len(pieces[-1])
    pieces.append(detokenizer.flush())
    return Echo("".join(pieces), tokens, offsets)
