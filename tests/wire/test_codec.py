"""The codec gives back what it was given, and takes apart nothing that it does not know."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.wire.message_strategy import of_message
from wire import codec
from wire.codec import Envelope, decode, encode
from wire.errors import MalformedMessage, VersionMismatch
from wire.messages import PROTOCOL_VERSION, TAGS, Message
from wire.request_messages import Abort, Reserve
from wire.types import AttemptId, NodeId, SamplingParams

node_ids = of_message(NodeId)
messages = st.one_of([of_message(kind) for kind in TAGS.values()])
envelopes = st.builds(Envelope, node_ids, st.none() | node_ids, messages)
scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
trees = st.recursive(
    scalars | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


def packed(*, tag: object = 26, version: object = PROTOCOL_VERSION, body: object = None) -> bytes:
    """A message with parts of any kind; an Abort unless told otherwise."""
    if body is None:
        body = {"id": {"request": "r", "attempt": 1}}
    data = msgpack.packb([version, tag, "router", 7, None, 0, body])
    assert isinstance(data, bytes)
    return data


def reserve_body(**sampling: object) -> dict[str, object]:
    return {
        "id": {"request": "r", "attempt": 1},
        "tokens": [1],
        "num_prompt_tokens": 1,
        "sampling": sampling,
        "prefill": {"name": "p", "incarnation": 3},
    }


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("kind", TAGS.values(), ids=lambda kind: str(kind.__name__))
def test_every_message_survives_the_round_trip(kind: type[Message]) -> None:
    @settings(max_examples=15, deadline=None)
    @given(st.builds(Envelope, node_ids, st.none() | node_ids, of_message(kind)))
    def check(envelope: Envelope) -> None:
        assert decode(encode(envelope)) == envelope

    check()


def test_every_message_has_exactly_one_tag() -> None:
    assert len(set(TAGS.values())) == len(TAGS)
    assert set(TAGS.values()) == set(get_args(Message))


def test_a_memoryview_is_decoded_too() -> None:
    assert decode(memoryview(packed())).message == Abort(AttemptId("r", 1))


# ---------------------------------------------------------------- nothing else comes out


def decode_or_refuse(data: bytes) -> None:
    with suppress(MalformedMessage, VersionMismatch):
        decode(data)


@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    decode_or_refuse(data)


@settings(max_examples=150, deadline=None)
@given(envelopes, st.data())
def test_truncated_messages_are_malformed(envelope: Envelope, draw: st.DataObject) -> None:
    data = encode(envelope)
    end = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(MalformedMessage):
        decode(data[:end])


@settings(max_examples=300, deadline=None)
@given(envelopes, st.data())
def test_mutated_messages(envelope: Envelope, draw: st.DataObject) -> None:
    data = bytearray(encode(envelope))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    decode_or_refuse(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(TAGS)), trees)
def test_any_tree_as_body(tag: int, tree: Any) -> None:
    decode_or_refuse(packed(tag=tag, body=tree if tree is not None else []))


@settings(max_examples=300, deadline=None)
@given(envelopes, st.data())
def test_one_field_replaced_by_any_tree(envelope: Envelope, draw: st.DataObject) -> None:
    parts = msgpack.unpackb(encode(envelope), strict_map_key=False)
    place = draw.draw(st.sampled_from([*range(6), *parts[6]]))
    target = parts if isinstance(place, int) else parts[6]
    target[place] = draw.draw(trees)
    decode_or_refuse(msgpack.packb(parts))


def nested(depth: int, opener: bytes) -> bytes:
    return opener * depth + b"\x90"


def huge_claims() -> bytes:
    return (b"\xdd" + (1 << 20).to_bytes(4, "big")) * 900 + b"\x00" * (1 << 16)


# A list nested so deep that Python can hold it, but not print it.
deep_version = b"\x97" + nested(1015, b"\x91") + b"\x14\xa1a\x01\xc0\x00\x80"
deep_tag = b"\x97\x01" + nested(1015, b"\x91") + b"\xa1a\x01\xc0\x00\x80"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x90",
        nested(5000, b"\x91"),
        nested(5000, b"\x81\xa1k"),
        deep_version,
        deep_tag,
        huge_claims(),
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\x81\x90\x01",  # a list as a key
        b"\xd7\xff" + bytes(8),  # a timestamp
        b"\xa1\xff",  # no UTF-8
        packed()[:-1] + b"\x01\x01",  # something behind the message
        packed(version=True),
        packed(version=1.0),
        packed(version="1"),
        packed(tag=True),
        packed(tag=1 << 63),
        packed(tag=-1),
        packed(body=[]),
        packed(body={1: 2, None: 3}),
        packed(body={"id": {"request": "", "attempt": 1}}),
        packed(body={"id": {"request": "r" * 257, "attempt": 1}}),
        packed(body={"id": {"request": "r", "attempt": 1 << 31}}),
        packed(body={"id": {"request": "r", "attempt": -1}}),
        packed(body={"id": {"request": "r", "attempt": True}}),
        packed(body={"id": {"request": "r", "attempt": 1.0}}),
        packed(body={"id": {"request": "r", "attempt": "1"}}),
    ],
)
def test_hostile_bytes_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


not_a_real: list[object] = [math.nan, math.inf, -math.inf, 1e300, []]


@pytest.mark.parametrize(
    "sampling",
    [
        {name: value}
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty")
        for value in not_a_real
    ]
    + [{"logit_bias": {5: math.nan}}, {"logit_bias": {"5": 1.0}}, {"stop_token_ids": [0] * 257}],
)
def test_sampling_parameters_are_finite_and_bounded(sampling: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        decode(packed(tag=20, body=reserve_body(**sampling)))


def test_integer_keys_are_kept() -> None:
    message = decode(packed(tag=20, body=reserve_body(logit_bias={5: 1.5}))).message
    assert isinstance(message, Reserve)
    assert message.sampling == SamplingParams(logit_bias={5: 1.5})


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": name} for name in ("int8", "float32\n", "", "Float32")] + [{"block_size": 0}],
)
def test_a_layout_that_this_version_cannot_count_is_malformed(wrong: dict[str, object]) -> None:
    layout = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 8, "block_size": 16}
    model: dict[str, object] = {"name": "m", "fingerprint": "f", "numerics": ""}
    model |= {"max_model_len": 1, "vocab_size": 1, "eos_token_ids": ()}
    body = {"role": "decode", "model": model, "layout": layout | {"dtype": "float32"} | wrong}
    with pytest.raises(MalformedMessage, match=f"layout.{next(iter(wrong))}"):
        decode(packed(tag=1, body=body))


def test_another_version_is_told_apart() -> None:
    with pytest.raises(VersionMismatch, match="version 3, this node 2"):
        decode(packed(version=3))


@pytest.mark.parametrize(
    ("tag", "body"),
    [
        (24, {"updates": [{}] * 1000}),
        (20, reserve_body() | {"tokens": ["x"] * 1000}),
        (42, {"units": [None] * 1000}),
        (46, {"claims": [None] * 1000}),
        (11, {"added": [b""] * 1000, "removed": [b""] * 1000}),
    ],
)
def test_a_wrong_message_is_refused_at_its_first_wrong_item(tag: int, body: object) -> None:
    """Pydantic would collect a million errors: 20 s and 4 GB for a message of 1 MB."""
    with pytest.raises(MalformedMessage) as caught:
        decode(packed(tag=tag, body=body))
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() < 20


def test_complaints_do_not_repeat_what_the_peer_says_at_length() -> None:
    body = reserve_body(logit_bias={"x" * 100_000: 1.0})
    with pytest.raises(MalformedMessage) as caught:
        decode(packed(tag=20, body=body))
    assert len(str(caught.value)) < 1000


def test_a_map_of_a_million_wrong_entries_is_not_looked_at() -> None:
    """Tuples fail fast, dicts cannot."""
    with pytest.raises(MalformedMessage, match="max_map_len"):
        decode(packed(tag=20, body=reserve_body(logit_bias=dict.fromkeys(range(10_000), "x"))))


def test_a_message_over_the_limit_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(MalformedMessage, match="more than 10"):
        decode(packed())
