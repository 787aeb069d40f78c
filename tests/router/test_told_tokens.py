"""Which tokens are told with which text: each once, none before its text, none behind the end."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from router.choice_text import ChoiceText, TextRules, Told
from router.detokenizer import ByteDetokenizer
from wire.types import FinishReason

BYTES = [*(bytes([b]) for b in range(256)), b""]
SPECIAL = 256
Pieces = list[tuple[str, list[Told]]]


def choice(*stops: str, min_tokens: int = 0, include_stop: bool = False) -> ChoiceText:
    rules = TextRules(stops, min_tokens, include_stop, tells_tokens=True)
    return ChoiceText(ByteDetokenizer(BYTES), rules)


def push(text: ChoiceText, tokens: tuple[int, ...], finish: FinishReason | None = None) -> str:
    """What is shown, with the tokens told: `shown|told`."""
    shown = text.push(tokens, finish, tuple(b"%d" % token for token in tokens))
    told = text.take_told()
    assert all(item.row == b"%d" % item.token for item in told)
    return f"{shown}|{[item.token for item in told]}"


def test_a_character_is_told_with_all_its_tokens() -> None:
    text = choice()
    first, *rest = "é".encode()
    assert push(text, (65, first)) == "A|[65]"
    assert push(text, tuple(rest)) == f"é|{[first, *rest]}"


def test_a_token_without_text_waits_for_the_next_one() -> None:
    text = choice()
    assert push(text, (SPECIAL,)) == "|[]"
    assert push(text, (65,)) == f"A|{[SPECIAL, 65]}"


def test_what_a_stop_string_holds_back_is_told_later() -> None:
    text = choice("BX")
    assert push(text, (65, 66)) == "A|[65]"
    assert push(text, (67,)) == "BC|[66, 67]"


def test_the_tokens_of_a_stop_string_are_told_and_none_behind_it() -> None:
    text = choice("BC")
    assert push(text, tuple(b"ABCD")) == "A|[65, 66, 67]"
    assert (text.num_tokens, text.finish) == (3, FinishReason.STOP)
    late = choice("BC")
    assert push(late, tuple(b"AB")) == "A|[65]"
    assert push(late, tuple(b"CD")) == "|[66, 67]"


def test_a_stop_string_that_is_shown() -> None:
    text = choice("BC", include_stop=True)
    assert push(text, tuple(b"AB")) == "A|[65]"
    assert push(text, tuple(b"CD")) == "BC|[66, 67]"
    assert push(choice(include_stop=True), tuple(b"AB"), FinishReason.STOP) == "AB|[65, 66]"


def test_the_token_that_ends_it_is_told_at_the_end() -> None:
    text = choice()
    assert push(text, (65, SPECIAL), FinishReason.STOP) == f"A|{[65, SPECIAL]}"
    half = choice()
    assert push(half, (65, 0xC3)) == "A|[65]"
    assert push(half, (SPECIAL,), FinishReason.STOP) == f"\ufffd|{[0xC3, SPECIAL]}"


def test_offsets_are_those_of_the_text() -> None:
    text = choice("XY")
    data = tuple("aé🎉bXY".encode())
    shown = text.push(data, None)
    told = text.take_told()
    assert shown == "aé🎉b"
    assert [item.offset for item in told] == [0, 1, 1, 2, 2, 2, 2, 3, 4, 4]


@given(
    data=st.text("abé🎉", max_size=20),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 60), max_size=6),
    min_tokens=st.integers(0, 5),
    include_stop=st.booleans(),
    ends=st.sampled_from([FinishReason.LENGTH, FinishReason.STOP]),
)
def test_every_counted_token_is_told_once_and_not_before_its_text(
    data: str,
    stops: list[str],
    cuts: list[int],
    min_tokens: int,
    include_stop: bool,
    ends: FinishReason,
) -> None:
    tokens = (*data.encode(), SPECIAL)
    whole = choice(*stops, min_tokens=min_tokens, include_stop=include_stop)
    expected = whole.push(tokens, ends)
    offsets = [item.offset for item in whole.take_told()]
    pieces = choice(*stops, min_tokens=min_tokens, include_stop=include_stop)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    shown, told = "", list[Told]()
    for start, end in itertools.pairwise(edges):
        if pieces.finish is None:
            finish = ends if end == len(tokens) else None
            shown += pieces.push(tokens[start:end], finish)
            told += pieces.take_told()
            if pieces.finish is None:
                data_told = bytes(item.token for item in told if item.token != SPECIAL)
                assert shown.startswith(data_told.decode())
    assert shown == expected
    assert [item.token for item in told] == list(tokens[: pieces.num_tokens])
    assert [item.offset for item in told] == offsets == sorted(offsets)
    assert all(offset <= len(shown) for offset in offsets)
