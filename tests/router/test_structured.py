"""Structured output at the router: what becomes a grammar, and what is refused before any node."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from tests.router.harness import Harness, endless, router
from wire.grammar import new_matcher
from wire.request_messages import Prefill, Reserve

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
BYTES = LLTokenizer("byte")
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": CITY, "strict": True}}
YES, NO = '{"city": "Bern"}', '{"town": "Bern"}'

TAG = {"begin": "<f>", "schema": CITY, "end": "</f>"}
TRIGGERED = {
    "type": "triggered_tags",
    "triggers": ["<f"],
    "tags": [
        {
            "type": "tag",
            "begin": "<f>",
            "content": {"type": "json_schema", "json_schema": CITY},
            "end": "</f>",
        }
    ],
}


def tags(structures: list[Any], triggers: tuple[str, ...] = ("<f",)) -> dict[str, Any]:
    tag = {"type": "structural_tag", "structures": structures, "triggers": list(triggers)}
    return {"structured_outputs": {"structural_tag": tag}}


TAGGED = f"So: <f>{YES}</f>, or <f>{YES}</f>!"
ASKING: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1, {}]}', "[1]"),
    ({"response_format": JSON_SCHEMA}, YES, NO),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "[1, null]", "x"),
    ({"structured_outputs": {"json": CITY}}, YES, NO),
    ({"structured_outputs": {"json": json.dumps(CITY)}}, YES, NO),
    ({"structured_outputs": {"json_object": True}}, '{"a":  1}', "1"),
    (
        {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
        '{"a":1}',
        '{"a": 1}',
    ),
    ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "12a"),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "maybe"),
    ({"structured_outputs": {"grammar": 'start: "a" | "b"'}}, "b", "c"),
    ({"structured_outputs": {"grammar": 'root ::= "a" x\nx ::= "b" | "c"'}}, "ac", "aa"),
    (tags([TAG]), TAGGED, f"So: <f>{NO}</f>"),
    (tags([TAG]), "", "<fg>"),
    (
        {"structured_outputs": {"structural_tag": json.dumps({"format": TRIGGERED})}},
        TAGGED,
        f"<f>{YES}<",
    ),
    (
        {"response_format": {"type": "structural_tag", "format": TRIGGERED}},
        "plain <b> text",
        "<f>",
    ),
    ({"guided_json": CITY}, YES, NO),
    ({"guided_json": CITY, "guided_whitespace_pattern": "_?"}, '{"city":_"B"}', '{"city": "B"}'),
    ({"guided_regex": "a+"}, "aaa", "b"),
    ({"guided_choice": ["a", "b"]}, "a", "c"),
    ({"guided_grammar": 'start: "a"'}, "a", "b"),
]


def fits(grammar: str, text: str) -> bool:
    matcher = new_matcher(BYTES, grammar)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


@pytest.mark.parametrize("chat", [False, True])
def test_what_reaches_the_nodes(chat: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            ask = harness.chat if chat else harness.complete
            for fields, good, bad in ASKING:
                answer = await ask(max_tokens=2, n=2, **fields)
                assert answer.status == 200, (fields, answer.body)
                grammars = {sent.sampling.grammar for sent in harness.sent(Prefill)[-2:]}
                grammars |= {sent.sampling.grammar for sent in harness.sent(Reserve)[-2:]}
                (grammar,) = grammars
                assert fits(grammar, good), (fields, good)
                assert not fits(grammar, bad), (fields, bad)

    asyncio.run(scenario())


def test_nothing_is_asked_for() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            nothing: list[dict[str, Any]] = [
                {"response_format": {"type": "text"}},
                {"response_format": None},
                {"structured_outputs": {}},
                {"guided_json": None},
                {"guided_decoding_backend": "auto"},
            ]
            for fields in nothing:
                assert (await harness.complete(**fields)).status == 200
                assert harness.sent(Prefill)[-1].sampling.grammar == ""

    asyncio.run(scenario())


def of_schema(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(300):
    DEEP = {"items": DEEP}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (of_schema({"type": "foo"}), "response_format.json_schema.schema", "foo"),
    (
        of_schema({"properties": {"a": {"items": {"not": {}}}, "b": {"type": "string"}}}),
        "response_format.json_schema.schema",
        "#/properties/a/items`",
    ),
    (
        of_schema({"anyOf": [{"$ref": "#/$defs/x"}], "$defs": {"x": {"format": "strange"}}}),
        "response_format.json_schema.schema",
        "#/$defs/x`",
    ),
    (of_schema({"$ref": "#/$defs/x"}), "response_format.json_schema.schema", "does not exist"),
    (of_schema({"$ref": "https://example.com/x"}), "response_format.json_schema.schema", ""),
    (of_schema(DEEP), "response_format.json_schema.schema", ""),
    (of_schema({"type": "array", "uniqueItems": True}), "response_format.json_schema.schema", ""),
    (of_schema({"enum": ["x" * 100_000]}), "response_format.json_schema.schema", "large"),
    (of_schema([]), "response_format.json_schema.schema", ""),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "Missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type", ""),
    ({"response_format": "json_object"}, "response_format", ""),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "regex"),
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"structured_outputs": {"grammar": "hello"}}, "structured_outputs.grammar", ""),
    ({"structured_outputs": {"grammar": "start: a\na: a"}}, "structured_outputs.grammar", "satisf"),
    ({"structured_outputs": {"grammar": "(" * 50_000}}, "structured_outputs.grammar", ""),
    ({"structured_outputs": {"grammar": "\n" * 60_000}}, "structured_outputs.grammar", "root"),
    (
        {"structured_outputs": {"grammar": "a ::= b\n" * 5000}},
        "structured_outputs.grammar",
        "rules",
    ),
    ({"structured_outputs": {"structural_tag": "{"}}, "structured_outputs.structural_tag", "JSON"),
    (tags([]), "structured_outputs.structural_tag.structures", ""),
    (tags([{**TAG, "begin": "[f]"}]), "structured_outputs.structural_tag", "trigger"),
    (tags([{**TAG, "schema": {"type": "x"}}]), "structured_outputs.structural_tag", ""),
    (
        tags([{"begin": "<f>", "end": ""}]),
        "structured_outputs.structural_tag.structures.0.schema",
        "",
    ),
    (
        {"structured_outputs": {"structural_tag": {"type": "structural_tag"}}},
        "structured_outputs.structural_tag",
        "needs",
    ),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "needs"),
    ({"response_format": {"type": "text", "triggers": ["<"]}}, "response_format.type", "tags"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "JSON"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "object"),
    ({"structured_outputs": {"tag": "x"}}, "structured_outputs.tag", ""),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "both"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "both"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "needs"),
    ({"guided_json": CITY, "guided_whitespace_pattern": "("}, "guided_json", ""),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", ""),
]


def test_refusals_say_where() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields, param, message in REFUSED:
                answer = await harness.complete(**fields)
                assert answer.status == 400, (fields, answer.body)
                assert answer.error["param"] == param, answer.error
                assert message in answer.error["message"], answer.error
                assert len(answer.error["message"]) <= 500
            assert not harness.sent(Prefill)
            assert (await harness.complete()).status == 200

    asyncio.run(scenario())


KEYWORDS = [
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
]
KEYWORDS += ["pattern", "format", "not", "required", "additionalProperties", "minItems", "maxItems"]
KEYWORDS += ["minimum", "maximum", "minLength"]
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYWORDS),
            inner
            | st.sampled_from(["object", "array", "string", "integer", "#", "#/$defs/a", "("]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


def test_fuzzed_structures_are_honoured_or_refused() -> None:
    """Whatever comes, the answer is 200 or 400, and the router lives on."""
    fuzzed = (
        st.dictionaries(st.sampled_from(["type", "properties", "items", "anyOf", "x"]), _values)
        .map(of_schema)
        .__or__(st.text(min_size=1).map(lambda text: {"structured_outputs": {"regex": text}}))
        .__or__(st.text(min_size=1).map(lambda text: {"structured_outputs": {"grammar": text}}))
        .__or__(st.text(min_size=1).map(lambda text: {"guided_choice": [text]}))
    )

    async def send_all(harness: Harness, bodies: list[dict[str, Any]]) -> None:
        for body in bodies:
            answer = await harness.complete(max_tokens=1, **body)
            assert answer.status in (200, 400), (body, answer.body)

    @settings(max_examples=8, deadline=None)
    @given(st.lists(fuzzed, min_size=20, max_size=30))
    def fuzz(bodies: list[dict[str, Any]]) -> None:
        async def scenario() -> None:
            async with router(endless) as harness:
                await send_all(harness, bodies)

        asyncio.run(scenario())

    fuzz()
