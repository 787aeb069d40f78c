"""Structured output: OpenAI's and vLLM's parameters become one grammar, checked by the router.

    response_format, structured_outputs, guided_… ──▶ grammar (text) ──▶ checked ──▶ sampling

A schema that cannot be compiled is told with the place in it that is at fault.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from router.api_structured import ResponseFormat, StructuredBody, StructuredOutputs
from router.errors import ApiError, bad_request
from router.structural_tags import as_structural_tag, tags_grammar
from wire.grammar import MAX_GRAMMAR_CHARS, GrammarChecker

WHITESPACE = r"[ \n\r\t]{0,16}"
"""Between the parts of JSON: without a bound a model may write nothing else until its limit."""

MAX_GBNF_RULES = 1000
"""The time to convert them grows with the square of their number."""

_LARK_LINE = re.compile(r"%llguidance\b|start[ \t]*:")
_MAX_PLACES = 256  # sub-schemas that are tried to find the one at fault


def grammar_of(body: StructuredBody) -> tuple[str, str]:
    """(the grammar, the parameter that asks for it); empty if none does. Raises ApiError."""
    asked = [*_of_response_format(body.response_format), *_of_guided(body)]
    if body.structured_outputs is not None:
        asked += _of_outputs(body.structured_outputs)
    if len(asked) > 1:
        raise bad_request(
            f"`{asked[0][1]}` and `{asked[1][1]}` cannot both say what the output is.",
            asked[1][1],
        )
    if not asked:
        return "", ""
    grammar, param = asked[0]
    return bounded(grammar, param, getattr(body, "ignore_eos", None)), param


def bounded(grammar: str, param: str, ignore_eos: bool | None) -> str:
    """`grammar`, if it may be sent at all. Raises ApiError."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise bad_request(f"`{param}` is too large: {len(grammar)} characters.", param)
    if ignore_eos:
        raise bad_request(f"`ignore_eos` is not available with `{param}`.", "ignore_eos")
    return grammar


def json_grammar(
    schema: dict[str, Any] | bool, whitespace: str | None = WHITESPACE, param: str = "schema"
) -> str:
    """The grammar of JSON that fits `schema`; whitespace None allows none. Raises ApiError."""
    options: Any = {"whitespace_flexible": False}
    if whitespace is not None:
        options = {"whitespace_pattern": whitespace}
    try:
        text = json.dumps(schema)
        if isinstance(schema, bool):
            return LLMatcher.grammar_from_json_schema(text)
        return LLMatcher.grammar_from_json_schema(text, overrides=options)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"Invalid value for `{param}`: {error}", param) from error


class Structured:
    """Checks grammars; remembers the newest ones."""

    def __init__(self) -> None:
        self._checker = GrammarChecker()
        self._mistake = lru_cache(maxsize=256)(self._checker.mistake)

    async def check(self, grammar: str, param: str) -> None:
        """Raise ApiError for a grammar that no node would take."""
        if not grammar:
            return
        mistake = await asyncio.to_thread(self._mistake, grammar)
        if mistake is None:
            return
        where = await asyncio.to_thread(self._where, grammar)
        raise bad_request(f"Invalid value for `{param}`{where}: {mistake}", param)

    def _where(self, grammar: str) -> str:
        """The innermost sub-schema that does not compile either, as a JSON pointer."""
        schema = _schema_in(grammar)
        if schema is None:
            return ""
        definitions: dict[str, Any] = {
            key: schema[key] for key in ("$defs", "definitions") if key in schema
        }
        path, current, left = "", schema, _MAX_PLACES
        while True:
            for step, part in _parts(current):
                left -= 1
                if left < 0:
                    return f" at `{path or '#'}`"
                if self._checker.mistake(json_grammar({**definitions, **part})) is not None:
                    path, current = f"{path or '#'}/{step}", part
                    break
            else:
                return f" at `{path}`" if path else ""


def _schema_in(grammar: str) -> dict[str, Any] | None:
    if not grammar.startswith("{"):
        return None
    schema = json.loads(grammar)["grammars"][0].get("json_schema")
    return schema if isinstance(schema, dict) else None


def _parts(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas within `schema`, with their places."""
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        named = schema.get(key)
        for name, part in named.items() if isinstance(named, dict) else ():
            if isinstance(part, dict):
                yield f"{key}/{_escaped(name)}", part
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        listed = schema.get(key)
        for index, part in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(part, dict):
                yield f"{key}/{index}", part
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield key, schema[key]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


# ------------------------------------------------------------ what the parameters ask for


def _of_response_format(format: ResponseFormat | None) -> list[tuple[str, str]]:
    if format is None:
        return []
    param = "response_format"
    if format.type == "structural_tag":
        return [(tags_grammar(format, WHITESPACE, param), param)]
    if any(value is not None for value in (format.structures, format.triggers, format.format)):
        raise bad_request(f"`{param}.type` must be `structural_tag` for tags.", f"{param}.type")
    if format.type == "text":
        return []
    if format.type == "json_object":
        return [(json_grammar({"type": "object"}), param)]
    if format.json_schema is None:
        raise bad_request(
            "Missing required parameter: `response_format.json_schema`.",
            "response_format.json_schema",
        )
    schema = format.json_schema.schema_
    param = "response_format.json_schema.schema"
    return [(json_grammar({} if schema is None else schema, param=param), param)]


def _of_guided(body: StructuredBody) -> list[tuple[str, str]]:
    """vLLM's older names."""
    options = StructuredOutputs(
        json=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
        whitespace_pattern=body.guided_whitespace_pattern,
    )
    if options.whitespace_pattern is not None and options.json_ is None:
        raise bad_request(
            "`guided_whitespace_pattern` needs `guided_json`.", "guided_whitespace_pattern"
        )
    return _of_outputs(options, "guided_")


def _of_outputs(
    options: StructuredOutputs, prefix: str = "structured_outputs."
) -> list[tuple[str, str]]:
    whitespace: str | None = options.whitespace_pattern or WHITESPACE
    if options.disable_any_whitespace:
        whitespace = None
    asked: list[tuple[str, str]] = []
    if options.json_ is not None:
        param = f"{prefix}json"
        asked.append((json_grammar(_as_schema(options.json_, param), whitespace, param), param))
    if options.json_object:
        param = f"{prefix}json_object"
        asked.append((json_grammar({"type": "object"}, whitespace, param), param))
    if options.structural_tag is not None:
        param = f"{prefix}structural_tag"
        tag = as_structural_tag(options.structural_tag, param)
        asked.append((tags_grammar(tag, whitespace, param), param))
    if options.regex is not None:
        asked.append((LLMatcher.grammar_from_regex(options.regex), f"{prefix}regex"))
    if options.choice is not None:
        choices = " | ".join(json.dumps(choice) for choice in options.choice)
        asked.append((LLMatcher.grammar_from_lark(f"start: {choices}"), f"{prefix}choice"))
    if options.grammar is not None:
        param = f"{prefix}grammar"
        asked.append((_lark(options.grammar, param), param))
    return asked


def _as_schema(value: dict[str, Any] | str, param: str) -> dict[str, Any]:
    """A schema may come as text."""
    if isinstance(value, dict):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise bad_request(f"Invalid value for `{param}`: not JSON: {error}", param) from error
    if not isinstance(schema, dict):
        raise bad_request(f"Invalid value for `{param}`: a schema is an object.", param)
    return schema


def _lark(text: str, param: str) -> str:
    """Lark's notation or GBNF's (llama.cpp, xgrammar)."""
    if len(text) > MAX_GRAMMAR_CHARS:
        raise bad_request(f"`{param}` is too large: {len(text)} characters.", param)
    if _is_lark(text):
        return LLMatcher.grammar_from_lark(text)
    if text.count("::=") > MAX_GBNF_RULES:
        raise bad_request(f"`{param}` has more than {MAX_GBNF_RULES} rules.", param)
    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except Exception as error:  # the converter raises what its parts raise
        raise _not_a_grammar(error, param) from error


def _is_lark(text: str) -> bool:
    """As the library tells it, which takes minutes for a text of empty lines."""
    lines = (line.lstrip() for line in text.splitlines())
    return any(_LARK_LINE.match(line) for line in lines)


def _not_a_grammar(error: Exception, param: str) -> ApiError:
    return bad_request(f"Invalid value for `{param}`: {error}", param)
