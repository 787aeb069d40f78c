"""The SSE parser gives the same events however the stream is cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.sse import SseError, SseParser

STREAM = (
    b"\xef\xbb\xbf: hello\n\ndata: one\n\n"
    b"event: x\r\ndata: two\r\ndata: lines\r\n\r\n"
    b"data:no space\r\r: ping\n\n\n\nid: 7\ndata:  \xc3\xa9\n\ndata\n\n"
    b"data: [DONE]\n\ndata: unfinished\n"
)
EVENTS = ["one", "two\nlines", "no space", " é", "[DONE]"]


def parse(pieces: list[bytes]) -> list[str]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_whole_stream_at_once() -> None:
    assert parse([STREAM]) == EVENTS


def test_every_single_cut() -> None:
    for cut in range(len(STREAM) + 1):
        assert parse([STREAM[:cut], STREAM[cut:]]) == EVENTS, cut


def test_byte_by_byte() -> None:
    assert parse([bytes([byte]) for byte in STREAM]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cuts(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(borders)]
    assert parse(pieces) == EVENTS


def test_an_event_comes_with_the_byte_that_ends_it() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\r\n\r") == ["a"]
    assert parser.feed(b"\ndata: b\n\n") == ["b"]


def test_too_large_a_line_and_too_large_an_event_are_refused() -> None:
    with pytest.raises(SseError, match="larger than 10"):
        SseParser(max_event_bytes=10).feed(b"data: 123456")
    parser = SseParser(max_event_bytes=12)
    parser.feed(b"data: 12345\n")
    with pytest.raises(SseError, match="larger than 12"):
        parser.feed(b"data: 67890\n")


def test_the_limit_is_per_event() -> None:
    parser = SseParser(max_event_bytes=12)
    for _ in range(5):
        assert parser.feed(b"data: 12345\n\n") == ["12345"]


def test_invalid_utf8_is_an_error() -> None:
    with pytest.raises(SseError, match="UTF-8"):
        SseParser().feed(b"data: \xff\n\n")
