"""Which format a model writes its calls in, and the parser for one answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.tools.array import ArrayParser
from router.tools.formats import deepseek, hermes, llama_json, mistral, pythonic
from router.tools.parsers import (
    NamedParser,
    TaggedParser,
    ThinkParser,
    UnwrappedParser,
    WholeParser,
)
from router.tools.pieces import Parser, PlainParser


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write calls."""

    make: Callable[[], Parser]
    needs_special_tokens: bool = False  # its markers are tokens that are not shown otherwise
    hermes_tags: tuple[str, str] | None = None  # around `{"name": …, "arguments": {…}}`


_HERMES_TAGS = ("<tool_call>", "</tool_call>")
FORMATS = {
    "hermes": CallFormat(
        lambda: TaggedParser(*_HERMES_TAGS, hermes),
        hermes_tags=_HERMES_TAGS,
    ),
    "mistral": CallFormat(lambda: TaggedParser("[TOOL_CALLS]", None, mistral), True),
    "deepseek": CallFormat(
        lambda: UnwrappedParser(
            ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
            TaggedParser("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", deepseek),
        ),
        True,
    ),
    "llama3_json": CallFormat(lambda: WholeParser(("<|python_tag|>", "{"), (), llama_json), True),
    "pythonic": CallFormat(
        lambda: WholeParser(("<|python_start|>", "["), ("<|python_end|>",), pythonic), True
    ),
}
_MARKS = {
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<｜tool▁calls▁begin｜>": "deepseek",
    "<|python_start|>": "pythonic",
    "<|python_tag|>": "llama3_json",
    "ipython": "llama3_json",
}


def call_format(name: str, template: str) -> CallFormat:
    """`name`'s format; for `auto` the one that the chat template shows, else Hermes'."""
    if name == "auto":
        name = next((known for mark, known in _MARKS.items() if mark in template), "hermes")
    return FORMATS[name]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the answers of one request are understood.

    Args:
        named: the one function that must be called: all text is its arguments.
        required: calls come as a JSON array, because the grammar says so.
    """

    calls: CallFormat | None = None
    named: str | None = None
    required: bool = False
    thinks: bool = False  # `<think>` may begin an answer
    began_thinking: bool = False  # the prompt has begun it

    @property
    def shows_special_tokens(self) -> bool:
        constrained = self.required or self.named is not None
        return self.calls is not None and self.calls.needs_special_tokens and not constrained

    def make_parser(self) -> Parser | None:
        """For one answer; None where all is text."""
        if self.named is not None:
            return NamedParser(self.named)
        if self.required:
            return ArrayParser()
        calls = None if self.calls is None else self.calls.make()
        if self.thinks:
            return ThinkParser(self.began_thinking, calls or PlainParser())
        return calls


READ_AS_TEXT = Reading()
