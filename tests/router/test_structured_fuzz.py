"""Whatever a schema, a regex, a grammar or a tag is: compiled or refused, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.api_chat import parse_chat
from router.errors import ApiError
from router.structured import grammar_of
from router.tools.choose import FORMATS, Reading
from wire.grammar import GrammarChecker

CHECKER = GrammarChecker()


def compiled_or_refused(**fields: Any) -> str | None:
    """Why the request is refused; None if it is not. Raises for everything else."""
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    refused = None
    try:
        grammar, _ = grammar_of(parse_chat(json.dumps(body).encode()))
    except ApiError as error:
        refused = error
    if refused is None:
        return CHECKER.mistake(grammar)
    assert refused.status == 400
    assert len(refused.message) <= 500
    return refused.message


def schema(value: Any) -> dict[str, Any]:
    return {"structured_outputs": {"json": value}}


def regex(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"regex": text}}


def grammar(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"grammar": text}}


def nested(depth: int, step: Callable[[Any], Any]) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(depth):
        value = step(value)
    return value


def _anyofs(i: int) -> dict[str, Any]:
    options = [{"type": "object", "properties": {f"a{i}{j}": {"type": "string"}}} for j in range(4)]
    return {"anyOf": options}


HOSTILE: dict[str, dict[str, Any]] = {
    "a billion items": schema({"type": "array", "minItems": 10**9}),
    "a billion characters": schema({"type": "string", "minLength": 10**9}),
    "a million to the third": schema({"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"}),
    "patterns that all hold": schema(
        {"allOf": [{"type": "string", "pattern": f".*{c}.{{50}}.*"} for c in "abcdefghij"]}
    ),
    "alternatives that all hold": schema({"allOf": [_anyofs(i) for i in range(12)]}),
    "many constants": schema({"anyOf": [{"const": f"k{i}"} for i in range(3000)]}),
    "deep items": schema(nested(900, lambda inner: {"items": inner})),
    "a reference to itself": schema({"$ref": "#"}),
    "parts of itself": schema({"allOf": [{"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}]}),
    "tiny steps": schema({"type": "number", "multipleOf": 1e-300}),
    "far bounds": schema({"type": "integer", "minimum": -(10**30), "maximum": 10**30}),
    "parentheses": regex("(" * 10_000 + ")" * 10_000),
    "a million a": regex("a{1000000}"),
    "many states": regex("[ab]*a[ab]{60}"),
    "stars of stars": regex("((a*)*)*b"),
    "a set of sets": regex("&".join(f"(.*{c}.*)" for c in "abcdefghijklmnop")),
    "ambiguous": grammar('start: a*\na: a a | "x"'),
    "doubling": grammar(
        "start: a0\n" + "\n".join(f"a{i}: a{i + 1} a{i + 1}" for i in range(60)) + '\na60: "x"'
    ),
    "many options": grammar("start: " + " ".join("x?" for _ in range(5000)) + '\nx: "a"'),
    "a long range": grammar('start: x{1,100000}\nx: "a" | "ab"'),
    "empty lines": grammar("\n" * 60_000),
    "a chain of rules": grammar(
        "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(999))
    ),
    "open brackets": grammar("root ::= " + "(" * 60_000),
}
_MAX_BYTES = 1 << 30

_PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
from tests.router.test_structured_fuzz import HOSTILE, compiled_or_refused
for fields in HOSTILE.values():
    compiled_or_refused(**fields)
assert not {{"torch", "transformers", "engine"}} & sys.modules.keys()
"""


def test_hostile_ones_take_bounded_memory() -> None:
    """All of them, one after the other, in a process that may not have more."""
    program = _PROGRAM.format(limit=_MAX_BYTES)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


_GRAMMAR_PIECES = st.sampled_from(
    (
        *(
            "root",
            "::=",
            "start",
            ":",
            "a",
            "b",
            "\n",
            " ",
            '"x"',
            "|",
            "(",
            ")",
            "[a-z]",
            "*",
            "+",
        ),
        *("?", "{2}", "{1,", "/x+/", "%json", "{}", "%llguidance {}", "[lazy]", "@a", "~", "<[5]>"),
        *("#", "\\"),
    )
)
_REGEX_PIECES = st.sampled_from(
    (
        *(
            "a",
            "(",
            ")",
            "[",
            "]",
            "a-z",
            "*",
            "+",
            "?",
            "{2,9}",
            "{999}",
            "|",
            "^",
            "$",
            "\\",
            "\\d",
        ),
        *(".", "(?=", "(?i)", "&", "~", "\\p{L}", "é", "\0"),
    )
)
_WORDS = st.sampled_from(
    ["object", "array", "string", "integer", "#", "#/$defs/a", "(", "date", "", "type"]
)
_KEYWORDS = st.sampled_from(
    (
        *(
            "type",
            "properties",
            "items",
            "anyOf",
            "allOf",
            "oneOf",
            "$ref",
            "$defs",
            "enum",
            "const",
        ),
        *("pattern", "format", "not", "required", "minItems", "maxItems", "minimum", "maximum"),
        *("exclusiveMinimum", "multipleOf", "minLength", "maxLength", "prefixItems", "a"),
        *("additionalProperties", "patternProperties", "minProperties", "x-guidance"),
    )
)
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYWORDS, inner, max_size=4),
    max_leaves=12,
)
_TAGS = st.fixed_dictionaries(
    {
        "structures": st.lists(
            st.fixed_dictionaries(
                {
                    "begin": st.text(max_size=4).map("<".__add__),
                    "schema": st.dictionaries(_KEYWORDS, _VALUES, max_size=3),
                    "end": st.text(max_size=4),
                }
            ),
            max_size=3,
        ),
        "triggers": st.lists(st.sampled_from(["<", "<a", "", "/"]), max_size=2),
    }
)


@pytest.mark.parametrize(
    "fields",
    [
        st.dictionaries(_KEYWORDS, _VALUES, max_size=5).map(schema),
        st.lists(_REGEX_PIECES, max_size=12).map("".join).map(regex),
        st.lists(_GRAMMAR_PIECES, max_size=20).map("".join).map(grammar),
        _TAGS.map(lambda tags: {"structured_outputs": {"structural_tag": tags}}),
    ],
    ids=["schema", "regex", "grammar", "tags"],
)
def test_whatever_comes_is_compiled_or_refused(fields: st.SearchStrategy[dict[str, Any]]) -> None:
    @settings(max_examples=150, deadline=None)
    @given(fields)
    def check(asked: dict[str, Any]) -> None:
        compiled_or_refused(**asked)

    check()


@pytest.mark.parametrize("name", [*FORMATS, "required"])
def test_whatever_a_model_says_is_understood(name: str) -> None:
    """As text, if not otherwise; however deep or long."""
    reading = Reading(required=True) if name == "required" else Reading(FORMATS[name])
    for text in ('{"a":' * 20_000, "[" * 100_000, '[{"name": "f", "parameters": ' + "{" * 50_000):
        for begin in ("", "<tool_call>", "[TOOL_CALLS]", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>"):
            parser = reading.make_parser()
            assert parser is not None
            assert [*parser.push(begin + text), *parser.flush()]
