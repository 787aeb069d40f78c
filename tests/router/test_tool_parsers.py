"""Calls are found however the text is cut; what is no call is text; nothing raises."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tools.array import MAX_HEAD_CHARS, ArrayParser
from router.tools.choose import FORMATS
from router.tools.formats import hermes, json_array, llama_json, mistral, pythonic
from router.tools.parsers import NamedParser, TaggedParser, ThinkParser, WholeParser
from router.tools.pieces import Arguments, Called, Parser, Piece, PlainParser, Said, Thought, merged

Make = Callable[[], Parser]


def new_hermes() -> Parser:
    return TaggedParser("<tool_call>", "</tool_call>", hermes)


def new_mistral() -> Parser:
    return TaggedParser("[TOOL_CALLS]", None, mistral)


def new_llama() -> Parser:
    return WholeParser(("<|python_tag|>", "{"), (), llama_json)


def new_pythonic() -> Parser:
    return WholeParser(("<|python_start|>", "["), ("<|python_end|>",), pythonic)


def new_array() -> Parser:
    return WholeParser(("[",), (), json_array)


def new_required() -> Parser:
    return ArrayParser()


def new_deepseek() -> Parser:
    return FORMATS["deepseek"].make()


def new_named() -> Parser:
    return NamedParser("f")


def new_think() -> Parser:
    return ThinkParser(False, new_hermes())


def new_thinking() -> Parser:
    return ThinkParser(True, PlainParser())


ALL: list[Make] = [
    new_hermes,
    new_mistral,
    new_llama,
    new_pythonic,
    new_array,
    new_deepseek,
    new_required,
    new_named,
    new_think,
    new_thinking,
]


def understood(make: Make, chunks: list[str]) -> list[Piece]:
    parser = make()
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)]
    return merged([*pieces, *parser.flush()])


CALL = '{"name": "f", "arguments": {"a": [1, "</x>"]}}'
F: list[Piece] = [Called("f"), Arguments('{"a": [1, "</x>"]}')]
DEEPSEEK_ALL, DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
NEWER = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'


def deepseek(name: str, a: int) -> str:
    """A call as V3 and R1 write it."""
    arguments = f'```json\n{{"a": {a}}}\n```'
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n{arguments}<｜tool▁call▁end｜>"


CASES: list[tuple[Make, str, list[Piece]]] = [
    (new_hermes, "hello <b>", [Said("hello <b>")]),
    (new_hermes, f"<tool_call>\n{CALL}\n</tool_call>", F),
    (new_hermes, f"I look:\n\n<tool_call>{CALL}</tool_call>\n", [Said("I look:"), *F]),
    (new_hermes, f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>", F + F),
    (new_hermes, f"<tool_call>{CALL}</tool_call> so", [*F, Said(" so")]),
    (new_hermes, " \n<tool_call>{</tool_call>", [Said(" \n<tool_call>{</tool_call>")]),
    (new_hermes, f"a <tool_call>{CALL}", [Said(f"a <tool_call>{CALL}")]),
    (new_hermes, "text ends so: <tool_", [Said("text ends so: <tool_")]),
    (
        new_hermes,
        '<tool_call>{"name": 3}</tool_call>',
        [Said('<tool_call>{"name": 3}</tool_call>')],
    ),
    (new_mistral, f"[TOOL_CALLS] [{CALL}, {CALL}]", F + F),
    (
        new_mistral,
        'x[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}',
        [Said("x"), Called("f"), Arguments('{"a": 1}'), Called("g"), Arguments("{}")],
    ),
    (new_mistral, "[TOOL_CALLS]oh no", [Said("[TOOL_CALLS]oh no")]),
    (new_llama, ' {"name": "f", "parameters": {"é": "ü"}}', [Called("f"), Arguments('{"é": "ü"}')]),
    (
        new_llama,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        [Called("f"), Arguments("{}"), Called("g"), Arguments("{}")],
    ),
    (new_llama, '{"answer": 42}', [Said('{"answer": 42}')]),
    (new_llama, "No { here", [Said("No { here")]),
    (
        new_pythonic,
        '[f(a=1, b=["x"]), m.g()]',
        [Called("f"), Arguments('{"a": 1, "b": ["x"]}'), Called("m.g"), Arguments("{}")],
    ),
    (
        new_pythonic,
        "<|python_start|>[f(a=None)]<|python_end|>",
        [Called("f"), Arguments('{"a": null}')],
    ),
    (new_pythonic, "[f(1)]", [Said("[f(1)]")]),
    (new_pythonic, "[f(a=__import__('os'))]", [Said("[f(a=__import__('os'))]")]),
    (new_pythonic, "[1, 2]", [Said("[1, 2]")]),
    (new_pythonic, "[" * 5000, [Said("[" * 5000)]),
    (new_array, '[{"name": "f", "parameters": {"a": 1}}]', [Called("f"), Arguments('{"a": 1}')]),
    (new_array, '[{"name": "f", "para', [Said('[{"name": "f", "para')]),
    (
        new_required,
        ' [ { "name": "f" , "parameters" : {"a": "}]\\""} } , {"name":"g","parameters":{} } ] ',
        [Called("f"), Arguments('{"a": "}]\\""}'), Called("g"), Arguments("{}")],
    ),
    (
        new_required,
        '[{"name": "f", "parameters": {"a": [1, {"b',
        [Called("f"), Arguments('{"a": [1, {"b')],
    ),
    (new_required, '[{"name": "f", "para', [Said('[{"name": "f", "para')]),
    (
        new_required,
        '[{"name": "f", "parameters": {}}, {"name": "g',
        [Called("f"), Arguments("{}")],
    ),
    (
        new_required,
        '[{"name": "f", "parameters": {}} oh',
        [Called("f"), Arguments("{}")],
    ),
    (new_required, "Oh [no]", [Said("Oh [no]")]),
    (new_required, '[{"name": "", "parameters": {}}]', [Said('[{"name": "", "parameters": {}}]')]),
    (new_required, "[" * MAX_HEAD_CHARS * 2, [Said("[" * MAX_HEAD_CHARS * 2)]),
    (
        new_deepseek,
        f"I look.{DEEPSEEK_ALL}{deepseek('f', 1)}\n{deepseek('g', 2)}{DEEPSEEK_END}",
        [
            Said("I look."),
            *(Called("f"), Arguments('{"a": 1}'), Called("g"), Arguments('{"a": 2}')),
        ],
    ),
    (new_deepseek, DEEPSEEK_ALL + NEWER + DEEPSEEK_END, [Called("f"), Arguments('{"a": 1}')]),
    (new_deepseek, DEEPSEEK_ALL + NEWER, [Called("f"), Arguments('{"a": 1}')]),
    (new_deepseek, "<｜tool▁call▁begin｜>f", [Said("<｜tool▁call▁begin｜>f")]),
    (new_deepseek, "<｜tool▁calls", [Said("<｜tool▁calls")]),
    (new_named, '{"a": 1}', [Called("f"), Arguments('{"a": 1}')]),
    (new_think, "<think>\nHm.\n</think>\n\nYes", [Thought("Hm."), Said("Yes")]),
    (new_think, f"<think>a <b</think><tool_call>{CALL}</tool_call>", [Thought("a <b"), *F]),
    (new_think, "Just so", [Said("Just so")]),
    (new_think, "<think></think>x", [Said("x")]),
    (new_think, "<think>never ends </thin", [Thought("never ends </thin")]),
    (new_thinking, "\nHm.\n\nWell</think>\nYes", [Thought("Hm.\n\nWell"), Said("Yes")]),
]


@pytest.mark.parametrize(("make", "text", "expected"), CASES)
def test_whole_and_letter_by_letter(make: Make, text: str, expected: list[Piece]) -> None:
    assert understood(make, [text]) == expected
    assert understood(make, list(text)) == expected


_fragments = st.one_of(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            "<think>",
            "</think>",
            "<|python_start|>",
            DEEPSEEK_ALL,
            NEWER,
            "<｜tool▁call▁begin｜>",
            '[{"name": "f", "parameters": {',
            '}, {"name": "g", "parameters":',
            CALL,
            "[",
            "]",
            "{",
            "}",
            "f(a=1)",
            '"',
            "\\",
            " ",
            "\n",
            "<",
            ">",
            ";",
        ]
    ),
    st.text(max_size=5),
)


@pytest.mark.parametrize("make", ALL)
def test_the_cuts_do_not_matter(make: Make) -> None:
    @given(st.lists(_fragments, max_size=12).map("".join), st.data())
    def check(text: str, data: st.DataObject) -> None:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        whole = understood(make, [text])
        assert understood(make, chunks) == whole
        assert understood(make, list(text)) == whole
        for before, piece in itertools.pairwise([None, *whole]):
            if isinstance(piece, Arguments):
                assert isinstance(before, Called)
                if make not in (new_named, new_required):
                    assert isinstance(json.loads(piece.text), dict)

    check()


@pytest.mark.parametrize("make", ALL[:5])
def test_text_without_calls_is_all_there(make: Make) -> None:
    @given(st.lists(_fragments, max_size=8).map("".join))
    def check(text: str) -> None:
        pieces = understood(make, [text])
        if all(isinstance(piece, Said) for piece in pieces):
            assert "".join(piece.text for piece in pieces if isinstance(piece, Said)) == text

    check()
