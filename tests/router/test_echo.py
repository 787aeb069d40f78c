"""Prompts that come back: their text, and where their tokens begin, for both kinds of tokenizer."""

from __future__ import annotations

import asyncio

import pytest
from tokenizers import AddedToken, processors

from router.echo import Echo, echo_of
from router.tokenizer import Tokenizer
from tests.router import tiny_tokenizer
from tests.router.test_router_text import byte_fallback_tokenizer

BOS = tiny_tokenizer.EOS


def with_bos() -> Tokenizer:
    """A byte-level tokenizer that begins every prompt with a special token."""
    tokenizer = tiny_tokenizer.build()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", BOS)]
    )
    return Tokenizer(tokenizer, None)


def sentencepiece_like() -> Tokenizer:
    tokenizer = byte_fallback_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Tokenizer(tokenizer, None)


PIECES = sentencepiece_like()
ID = {piece: PIECES._tokenizer.token_to_id(piece) for piece in ("▁hello", "▁world", "ing", "<s>")}


def echo(tokenizer: Tokenizer, text: str, add_special_tokens: bool = True) -> Echo:
    encoded = asyncio.run(tokenizer.encode(text, add_special_tokens))
    return echo_of(encoded.ids, encoded.added, tokenizer)


def test_what_the_tokenizer_added_is_not_echoed() -> None:
    told = echo(with_bos(), "hé")
    assert (told.text, told.offsets) == ("hé", [0, 0, 1, 1])
    assert list(told.tokens) == [BOS, *"hé".encode()]


def test_what_the_prompt_spells_out_is_echoed() -> None:
    told = echo(with_bos(), "</s>h")
    assert (told.text, told.offsets) == ("</s>h", [0, 0, 4])
    plain = echo(with_bos(), "</s>h", add_special_tokens=False)
    assert (plain.text, plain.offsets) == ("</s>h", [0, 4])


def test_half_a_character_at_the_end_is_shown() -> None:
    told = echo_of([104, 0xC3], [], with_bos())
    assert (told.text, told.offsets) == ("h\ufffd", [0, 1])


def test_tokens_that_depend_on_their_neighbours() -> None:
    tokens = [ID["▁hello"], ID["▁world"], *"é".encode(), ID["ing"]]
    told = echo_of(tokens, [], PIECES)
    assert told.text == "hello worldéing"
    assert told.offsets == [0, 5, 11, 11, 12]


def test_first_tokens_have_no_logprobs() -> None:
    told = echo(with_bos(), "hi")
    assert [item.row for item in told.told([b"1", b"2"])] == [None, b"1", b"2"]
    assert [item.row for item in told.told([])] == [None, None, None]


@pytest.mark.parametrize(
    ("piece", "data"),
    [("▁hello", b" hello"), ("ing", b"ing"), ("<0xC3>", b"\xc3"), ("<s>", b"<s>")],
)
def test_bytes_of_pieces(piece: str, data: bytes) -> None:
    token = PIECES._tokenizer.token_to_id(piece)
    assert token is not None
    assert PIECES.token_bytes(token) == data
    assert PIECES.token_bytes(1 << 20) == b""


def test_bytes_of_byte_level_tokens() -> None:
    tokenizer = with_bos()
    assert [tokenizer.token_bytes(i) for i in (104, 0xC3, BOS)] == [b"h", b"\xc3", b"</s>"]
    assert tokenizer.token_bytes(1 << 20) == b""
