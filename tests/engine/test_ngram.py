"""What the lookup finds, against a search token by token."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.drafting.drafter import Ask
from engine.drafting.ngram import NgramDrafter, continuation
from engine.request import Request
from wire.types import SamplingParams


def searched(text: Sequence[int], min_tokens: int, max_tokens: int) -> int | None:
    for length in range(min(max_tokens, len(text) - 1), min_tokens - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if list(text[end - length : end]) == list(text[-length:]):
                return end
    return None


@given(
    st.lists(st.sampled_from([0, 1, 1 << 8, 257 << 8]), min_size=1, max_size=40),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_the_last_occurrence_of_the_longest_suffix(
    text: list[int], min_tokens: int, more: int
) -> None:
    found = continuation(bytearray(array("i", text).tobytes()), min_tokens, min_tokens + more)
    assert found == searched(text, min_tokens, min_tokens + more)


def request_of(tokens: list[int]) -> Request:
    return Request("r", list(tokens), 1, SamplingParams(), 1000)


def draft(drafter: NgramDrafter, request: Request, num_tokens: int) -> list[int]:
    return list(drafter.propose([Ask(request, num_tokens)])[0])


def test_a_draft_goes_on_with_its_own_beginning() -> None:
    request = request_of([9, 1, 2, 3, 1, 2, 3, 1])
    assert draft(NgramDrafter(2, 4), request, 8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_it_follows_what_is_added() -> None:
    drafter, request = NgramDrafter(2, 4), request_of([1, 2, 3, 4, 5])
    assert draft(drafter, request, 3) == []
    request.tokens += [1, 2]
    assert draft(drafter, request, 3) == [3, 4, 5]
    request.tokens += [3, 4, 6, *range(100, 200), 4, 6]
    assert draft(drafter, request, 2) == [100, 101]
    assert draft(drafter, request, 0) == []
