"""What a body says of its output's structure; see `router/api.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ALTERNATIVES = 4096
MAX_PATTERN_CHARS = 64 << 10

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]
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


class ResponseFormat(Strict):
    """OpenAI's response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Strict):
    """vLLM's structured_outputs: one of the first five."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: Alternatives | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
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
