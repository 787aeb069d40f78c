"""JSON Schema's own cases: a schema is kept to exactly, or refused as docs/api.md lists it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLTokenizer

from router.errors import ApiError
from router.structured import json_grammar
from wire.grammar import GrammarChecker, new_matcher

CASES: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "json_schema_suite" / "cases.json").read_text()
)
DOCS = Path(__file__).resolve().parents[2] / "docs" / "api.md"
BYTES = LLTokenizer("byte")
CHECKER = GrammarChecker()

# Valid instances that are never written: a schema may be satisfied in fewer ways than it allows.
UNWRITTEN = {
    "allOf": "the properties of its parts come in an order of their own",
    "allOf with base schema": "the same",
    "const with object": "properties come in the schema's order",
    "validation of e-mail addresses": "no quoted local parts",
    "validation of IPv6 addresses": "no mixed notation",
}
NAMES = {"if-then-else": "if"}
# Invalid instances that may be written: these formats are matched by their form alone.
BY_FORM = {"format date-time", "format date", "format time", "format hostname"}


def mistake(schema: dict[str, Any]) -> str | None:
    try:
        return CHECKER.mistake(json_grammar(schema))
    except ApiError as error:
        return error.message


def writes(grammar: str, instance: Any) -> bool:
    matcher = new_matcher(BYTES, grammar)
    text = json.dumps(instance, ensure_ascii=False).encode()
    return matcher.consume_tokens(list(text)) and matcher.is_accepting()


def has_whole_float(instance: Any) -> bool:
    """1.0 is an integer to JSON Schema; it is written as 1."""
    if isinstance(instance, list):
        return any(map(has_whole_float, instance))
    return isinstance(instance, float) and instance.is_integer()


@pytest.mark.parametrize("keyword", CASES)
def test_a_keyword_is_kept_to_or_refused(keyword: str) -> None:
    for case in CASES[keyword]:
        found = mistake(case["schema"])
        assert (found is not None) == case.get("refused", False), (case, found)
        if found is not None:
            continue
        grammar = json_grammar(case["schema"])
        for instance in case["valid"]:
            if case["about"] not in UNWRITTEN and not has_whole_float(instance):
                assert writes(grammar, instance), (case, instance)
        for instance in case["invalid"]:
            if keyword not in BY_FORM:
                assert not writes(grammar, instance), (case, instance)


def test_what_can_be_written_is_mostly_everything() -> None:
    """The exceptions above are few."""
    kept = [case for cases in CASES.values() for case in cases if "valid" in case]
    known = [(case, instance) for case in kept for instance in case["valid"]]
    unwritten = [
        instance for case, instance in known if not writes(json_grammar(case["schema"]), instance)
    ]
    assert len(known) > 250
    assert len(unwritten) < len(known) / 15


def test_the_docs_list_what_is_refused() -> None:
    refused = {
        keyword for keyword, cases in CASES.items() if all(case.get("refused") for case in cases)
    }
    text = DOCS.read_text().partition("- Not supported of JSON Schema:")[2]
    listed = text.partition(" and other formats than ")[0]
    told = {" ".join(name) for name in re.findall(r"(?:(format)\s)?`([^`]+)`", listed)}
    assert {name.strip() for name in told} == {NAMES.get(name, name) for name in refused}
