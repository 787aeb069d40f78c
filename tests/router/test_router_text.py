"""Detokenization, stop strings and the text of a choice, against naive oracles."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from router.choice_text import ChoiceText, TextRules
from router.detokenizer import ByteDetokenizer, WindowDetokenizer
from router.stops import StopMatcher
from wire.types import FinishReason

BYTES = [bytes([b]) for b in range(256)]
TEXTS = ["naïve café", "日本語とemoji 🎉👩‍👩‍👧", "a\x00b\ufffdc", "", "𝔘𝔫𝔦"]


def byte_fallback_tokenizer() -> Tokenizer:
    """SentencePiece style: words with a space marker, bytes for everything else."""
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    for word in ("▁", "▁hello", "▁world", "hello", "ing"):
        vocab[word] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


FALLBACK = byte_fallback_tokenizer()


def decode_fallback(ids: list[int]) -> str:
    return str(FALLBACK.decode(ids))


@pytest.mark.parametrize("text", TEXTS)
def test_no_prefix_ever_shows_half_a_character(text: str) -> None:
    data = text.encode()
    for detokenizer in (ByteDetokenizer(BYTES), WindowDetokenizer(decode_fallback)):
        shown = ""
        for end in range(len(data)):
            shown += detokenizer.push((data[end],))
            assert text.startswith(shown)
        assert shown + detokenizer.flush() == text


@given(data=st.binary(max_size=40), cuts=st.lists(st.integers(0, 40), max_size=10))
def test_bytes_decode_as_a_whole_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    detokenizer = ByteDetokenizer(BYTES)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [tuple(data[a:b]) for a, b in itertools.pairwise(edges)]
    shown = "".join(detokenizer.push(piece) for piece in pieces) + detokenizer.flush()
    assert shown == data.decode("utf-8", "replace")


@given(ids=st.lists(st.integers(0, 260), max_size=30), cut=st.integers(0, 30))
def test_window_text_does_not_depend_on_grouping(ids: list[int], cut: int) -> None:
    single, grouped = WindowDetokenizer(decode_fallback), WindowDetokenizer(decode_fallback)
    one_by_one = "".join(single.push((i,)) for i in ids) + single.flush()
    assert grouped.push(ids[:cut]) + grouped.push(ids[cut:]) + grouped.flush() == one_by_one


@given(words=st.lists(st.sampled_from(["▁hello", "▁world", "ing", "é", "🎉"]), max_size=20))
def test_window_text_equals_the_whole_decoded_at_once(words: list[str]) -> None:
    ids: list[int] = []
    for word in words:
        known = FALLBACK.token_to_id(word)
        ids += [known] if known is not None else list(word.encode())
    detokenizer = WindowDetokenizer(decode_fallback)
    assert detokenizer.push(ids) + detokenizer.flush() == decode_fallback(ids)


def test_window_keeps_the_space_after_the_prompt() -> None:
    hello, world = (FALLBACK.get_vocab()[word] for word in ("▁hello", "▁world"))
    assert WindowDetokenizer(decode_fallback, [hello]).push((world,)) == " world"
    assert WindowDetokenizer(decode_fallback).push((world,)) == "world"


def test_half_a_character_at_the_prompts_end_spoils_nothing() -> None:
    prompt = list("🎉🎉🎉".encode())
    detokenizer = WindowDetokenizer(decode_fallback, prompt)
    assert detokenizer.push(list("日🎉".encode())) == "日🎉"


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(len(stop) for stop in hits)], True
    return text, False


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_stops_equal_the_naive_search(pieces: list[str], stops: list[str]) -> None:
    expected, expected_hit = naive_stop("".join(pieces), stops)
    matcher = StopMatcher(stops)
    shown, hit = "", False
    for piece in pieces:
        text, hit = matcher.push(piece)
        shown += text
        assert expected.startswith(shown)
        if hit:
            break
    if not hit:
        shown += matcher.flush()
    assert (shown, hit) == (expected, expected_hit)


def test_only_a_possible_beginning_of_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two\n\nUs") == ("\ntwo", False)
    assert matcher.push("e it") == ("\n\nUse it", False)


def choice(stops: Sequence[str] = (), min_tokens: int = 0) -> ChoiceText:
    return ChoiceText(ByteDetokenizer(BYTES), TextRules(tuple(stops), min_tokens))


def test_the_stop_token_is_counted_and_not_shown() -> None:
    text = choice()
    assert text.push((65, 66), None) + text.push((67, 10), FinishReason.STOP) == "ABC"
    assert (text.num_tokens, text.finish) == (4, FinishReason.STOP)


def test_the_last_token_is_shown_when_the_length_ended_it() -> None:
    text = choice()
    assert text.push((65, 66), FinishReason.LENGTH) == "AB"
    assert text.finish is FinishReason.LENGTH


def test_half_a_character_is_flushed_at_the_end() -> None:
    text = choice()
    assert text.push(tuple("é".encode()[:1]), None) == ""
    assert text.push((65,), FinishReason.LENGTH) == "\ufffdA"
    late = choice()
    assert late.push(tuple("é".encode()[:1]), FinishReason.LENGTH) == "\ufffd"


def test_tokens_after_a_stop_string_are_not_counted() -> None:
    text = choice(["B"])
    assert text.push(tuple(b"AABXYZ"), FinishReason.LENGTH) == "AA"
    assert (text.num_tokens, text.finish) == (3, FinishReason.STOP)


def test_stop_strings_wait_for_min_tokens() -> None:
    text = choice(["B"], min_tokens=2)
    assert text.push(tuple(b"ABABC"), None) == "ABA"
    assert (text.num_tokens, text.finish) == (4, FinishReason.STOP)


def test_held_text_is_shown_when_the_choice_ends_otherwise() -> None:
    text = choice(["BX"])
    assert text.push(tuple(b"AB"), None) == "A"
    assert text.push((10,), FinishReason.STOP) == "B"
    assert text.num_tokens == 3


@given(
    data=st.text("abé🎉", max_size=20),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    min_tokens=st.integers(0, 5),
)
def test_text_and_count_do_not_depend_on_messages(
    data: str, stops: list[str], cuts: list[int], min_tokens: int
) -> None:
    tokens = tuple(data.encode())
    whole, pieces = choice(stops, min_tokens), choice(stops, min_tokens)
    expected = whole.push(tokens, FinishReason.LENGTH)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    shown = ""
    for start, end in itertools.pairwise(edges):
        if pieces.finish is None:
            shown += pieces.push(tokens[start:end], None)
    if pieces.finish is None:
        shown += pieces.push((), FinishReason.LENGTH)
    assert (shown, pieces.num_tokens, pieces.finish) == (expected, whole.num_tokens, whole.finish)
