"""Tokenizer and chat template, without transformers."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api_chat import ChatMessage
from router.errors import ApiError
from router.tokenizer import INLINE_CHARS, Tokenizer, load_tokenizer, tokenizer_from_files
from tests.router import tiny_tokenizer
from wire.errors import ConfigError
from wire.fleet_messages import TokenizerFiles

RUST = tiny_tokenizer.build()
TOKENIZER = tokenizer_from_files(tiny_tokenizer.files(), "test")


def chat(*turns: tuple[str, str]) -> list[ChatMessage]:
    return [ChatMessage.model_validate({"role": role, "content": text}) for role, text in turns]


def test_encodes_short_and_long_text_alike() -> None:
    text = "héllo 🎉 " * INLINE_CHARS
    assert asyncio.run(TOKENIZER.encode(text)).ids == list(text.encode())
    assert asyncio.run(TOKENIZER.encode("hé")).ids == list("hé".encode())


@given(ids=st.lists(st.integers(0, tiny_tokenizer.VOCAB_SIZE - 1), max_size=30))
def test_text_equals_the_tokenizers_own_decoding(ids: list[int]) -> None:
    detokenizer = TOKENIZER.detokenizer([])
    text = "".join(detokenizer.push((token,)) for token in ids) + detokenizer.flush()
    assert text == RUST.decode(ids, skip_special_tokens=True)


def test_chat_template_gets_special_tokens_and_opens_the_answer() -> None:
    tokens = asyncio.run(TOKENIZER.encode_chat(chat(("user", "hi"))))
    assert RUST.decode(tokens, skip_special_tokens=False) == "<|user|>hi</s><|assistant|>"
    assert tokens[0] == 257  # special tokens in the template's text are tokens, not characters


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    tokens = asyncio.run(TOKENIZER.encode_chat(chat(("developer", "be brief"), ("user", "hi"))))
    assert b"<|system|>be brief" in bytes(token for token in tokens if token < 256)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = ChatMessage.model_validate({"role": "user", "content": parts})
    assert b"a\nb" in bytes(t for t in asyncio.run(TOKENIZER.encode_chat([message])) if t < 256)


def test_what_the_template_refuses_is_a_bad_request() -> None:
    messages = chat(("user", "hi"), ("system", "late"))
    with pytest.raises(ApiError, match="System message must come first") as caught:
        asyncio.run(TOKENIZER.encode_chat(messages))
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_template_cannot_reach_python() -> None:
    evil = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(ApiError, match="refuses"):
        asyncio.run(with_template(evil).encode_chat(chat(("user", "hi"))))


def test_templates_may_use_the_usual_helpers() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{{ m | tojson }}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    tokens = asyncio.run(with_template(source).encode_chat(chat(("user", "<é>"), ("user", "b"))))
    assert bytes(tokens).decode() == '{"role": "user", "content": "<é>"}20'


def test_without_a_template_chat_is_refused() -> None:
    plain = tokenizer_from_files(TokenizerFiles(RUST.to_str().encode(), b"{}"), "test")
    with pytest.raises(ApiError, match="no chat template"):
        asyncio.run(plain.encode_chat(chat(("user", "hi"))))


def with_template(source: str) -> Tokenizer:
    """As a file of its own, which wins over the config's."""
    files = tiny_tokenizer.files()
    return tokenizer_from_files(
        TokenizerFiles(files.tokenizer_json, files.tokenizer_config_json, source.encode()), "test"
    )


def test_loads_from_a_folder_and_from_a_file(tmp_path: Path) -> None:
    files = tiny_tokenizer.files()
    (tmp_path / "tokenizer.json").write_bytes(files.tokenizer_json)
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        tokens = asyncio.run(load_tokenizer(path).encode_chat(chat(("user", "hi"))))
        assert bytes(tokens) == b"yes"


def test_a_missing_or_broken_tokenizer_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*tokenizer.json: No such"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    broken = TokenizerFiles(RUST.to_str().encode(), b"{}", b"{% for %}")
    with pytest.raises(ConfigError, match="does not parse"):
        tokenizer_from_files(broken, "test")
