"""Structural tags: text that is free but for tagged parts, which have schemas.

    free text <trigger…begin> JSON that fits the schema <end> free text …

A trigger is where freedom ends: behind it one of the tags must go on.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, StructTag

from router.api_structured import StructuralTag, TaggedSchema
from router.errors import bad_request
from router.parsing import validate


def as_structural_tag(value: dict[str, Any] | str, param: str) -> StructuralTag:
    """It may come as text, as in vLLM. Raises ApiError."""
    fields = value
    if isinstance(value, str):
        try:
            fields = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"Invalid value for `{param}`: not JSON: {error}", param) from error
    if not isinstance(fields, dict):
        raise bad_request(f"Invalid value for `{param}`: it must be an object.", param)
    return validate(StructuralTag, fields, f"{param}.")


def tags_grammar(tag: StructuralTag, whitespace: str | None, param: str) -> str:
    """The grammar; whitespace None allows none between the parts of JSON. Raises ApiError."""
    structures, triggers = _listed(tag, param)
    tags = [_as_tag(structure, triggers, whitespace, param) for structure in structures]
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


def _listed(tag: StructuralTag, param: str) -> tuple[list[TaggedSchema], list[str]]:
    """Both notations, the older one and that of `triggered_tags`, say the same."""
    if tag.format is not None and tag.structures is None and tag.triggers is None:
        tags = [
            TaggedSchema(begin=one.begin, schema=one.content.json_schema, end=one.end)
            for one in tag.format.tags
        ]
        return tags, tag.format.triggers
    if tag.format is None and tag.structures is not None and tag.triggers is not None:
        return tag.structures, tag.triggers
    raise bad_request(f"`{param}` needs `structures` and `triggers`, or `format`.", param)


def _as_tag(
    structure: TaggedSchema, triggers: list[str], whitespace: str | None, param: str
) -> StructTag:
    trigger = next((text for text in triggers if structure.begin.startswith(text)), None)
    if trigger is None:
        raise bad_request(f"Invalid value for `{param}`: a tag begins with no trigger.", param)
    return StructTag(
        trigger=trigger,
        begin=structure.begin,
        grammar=with_whitespace(structure.schema_, whitespace, param),
        end=structure.end,
    )


def with_whitespace(schema: dict[str, Any], whitespace: str | None, param: str) -> dict[str, Any]:
    """`schema` with what may stand between the parts of JSON, within another grammar."""
    options: dict[str, Any] = {"whitespace_flexible": False}
    if whitespace is not None:
        options = {"whitespace_pattern": whitespace}
    try:
        json.dumps(schema)
    except RecursionError as error:
        raise bad_request(f"Invalid value for `{param}`: it is too deep.", param) from error
    return {**schema, "x-guidance": options}
