"""What a body says of its output's structure; see `router/api.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ALTERNATIVES = 4096
MAX_PATTERN_CHARS = 64 << 10
MAX_TAGS = 256
MAX_MARKER_CHARS = 1024

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
Marker = Annotated[str, Field(min_length=1, max_length=MAX_MARKER_CHARS)]
Triggers = Annotated[list[Marker], Field(min_length=1, max_length=MAX_TAGS, fail_fast=True)]
Alternatives = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]],
    Field(min_length=1, max_length=MAX_ALTERNATIVES, fail_fast=True),
]


class Strict(BaseModel):
    """No unknown field, no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class JsonSchema(Strict):
    """OpenAI's json_schema; the schema is kept to whether `strict` is true or not."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TaggedSchema(Strict):
    """What stands between two texts."""

    begin: Marker
    schema_: dict[str, Any] = Field(alias="schema")
    end: Annotated[str, Field(max_length=MAX_MARKER_CHARS)]


class TagContent(Strict):
    """What stands within a tag."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any]


class TagFormat(Strict):
    """One tag."""

    type: Literal["tag"] | None = None
    begin: Marker
    content: TagContent
    end: Annotated[str, Field(max_length=MAX_MARKER_CHARS)]


class TriggeredTags(Strict):
    """Tags in free text, each behind its trigger."""

    type: Literal["triggered_tags"]
    triggers: Triggers
    tags: Annotated[list[TagFormat], Field(min_length=1, max_length=MAX_TAGS, fail_fast=True)]
    at_least_one: Literal[False] | None = None
    stop_after_first: Literal[False] | None = None


class StructuralTag(Strict):
    """xgrammar's two notations, as vLLM takes them."""

    type: Literal["structural_tag"] | None = None
    structures: (
        Annotated[list[TaggedSchema], Field(min_length=1, max_length=MAX_TAGS, fail_fast=True)]
        | None
    ) = None
    triggers: Triggers | None = None
    format: TriggeredTags | None = None


class ResponseFormat(StructuralTag):
    """OpenAI's response_format; the fields of a structural tag belong to that type."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]  # type: ignore[assignment]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's structured_outputs: one of the first six."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    whitespace_pattern: Pattern | None = None
    disable_any_whitespace: bool | None = None


class StructuredBody(Strict):
    """The parameters that constrain an output; at most one may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Pattern | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: Pattern | None = None
    guided_whitespace_pattern: Pattern | None = None
