"""A response becomes a record: which chunks count, and what counts as a failure."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tuner.record import ProtocolError, RequestRecord, StreamReader, error_text


def event(**body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def text(value: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": value, "finish_reason": finish}])


def delta(finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": fields, "finish_reason": finish}])


DONE = b"data: [DONE]\n\n"


def read(*parts: bytes) -> StreamReader:
    """Feed one part per second, from second 0 on, and close."""
    reader = StreamReader()
    for now, part in enumerate(parts):
        reader.feed(part, float(now))
    reader.close()
    return reader


def test_completion_with_usage() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 7}
    reader = read(text("a"), text("b"), text("", "length"), event(choices=[], usage=usage), DONE)
    assert reader.chunk_times == [0, 1]
    assert (reader.prompt_tokens, reader.output_tokens) == (5, 7)


def test_without_usage_chunks_are_counted() -> None:
    assert read(text("a"), text("b", "stop"), DONE).output_tokens == 2


def test_usage_event_without_choices_and_null_usage_are_accepted() -> None:
    null = event(choices=[{"index": 0, "text": "a", "finish_reason": "stop"}], usage=None)
    reader = read(null, event(usage={"completion_tokens": 3}), DONE)
    assert reader.output_tokens == 3


def test_usage_that_is_no_count_stays_unknown() -> None:
    odd = event(choices=None, usage={"prompt_tokens": "many", "completion_tokens": None})
    reader = read(text("a"), odd, text("b", "stop"), DONE)
    assert (reader.prompt_tokens, reader.output_tokens) == (0, 2)


def test_chat_role_is_not_output_but_reasoning_and_tool_calls_are() -> None:
    reader = read(
        delta(role="assistant", content=""),
        delta(reasoning_content="hm"),
        delta(reasoning="hm"),
        delta(content="a"),
        delta(tool_calls=[{"index": 0}]),
        delta("stop"),
        DONE,
    )
    assert reader.chunk_times == [1, 2, 3, 4]


def test_events_in_one_piece_share_its_time() -> None:
    assert read(b": ping\n\n", text("a") + text("b"), text("", "stop") + DONE).chunk_times == [1, 1]


@pytest.mark.parametrize(
    ("parts", "kind"),
    [
        ((text("a"), event(error={"message": "node lost"})), "stream_error"),
        ((text("a"),), "truncated"),
        ((text("a", "stop"),), "truncated"),
        ((text("a"), DONE), "truncated"),
        ((DONE,), "truncated"),
        ((b"data: {nope\n\n",), "bad_stream"),
        ((b"data: 3\n\n",), "bad_stream"),
        ((b'data: {"choices": 5}\n\n',), "bad_stream"),
        ((b"data: \xff\n\n",), "bad_stream"),
    ],
)
def test_failures_have_a_kind(parts: tuple[bytes, ...], kind: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(*parts)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "no"}},
        {"error": "no"},
        {"message": "no"},
        {"detail": "no"},
        "no",
    ],
)
def test_error_text(body: Any) -> None:
    assert error_text(body) == "no"


def record(chunk_times: tuple[float, ...], output_tokens: int) -> RequestRecord:
    return RequestRecord(
        index=0, due=9.0, start=10.0, end=20.0, chunk_times=chunk_times, output_tokens=output_tokens
    )


def test_latencies_are_differences_on_the_timeline() -> None:
    some = record((11.0, 12.0, 14.0), output_tokens=7)
    assert some.ttft == 1.0
    assert some.tpot == 0.5  # 3 s for six tokens after the first
    assert some.itls == [1.0, 2.0]
    assert some.e2e == 10.0


def test_too_few_tokens_have_no_tpot() -> None:
    assert record((), 0).ttft is None
    assert record((11.0,), 1).tpot is None
    assert record((11.0,), 5).tpot is None
    assert record((11.0, 12.0), 1).tpot is None
