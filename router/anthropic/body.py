"""The bodies of Anthropic's API: every parameter is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from router.api_structured import Strict
from router.api_tools import MAX_TOOLS, ToolName
from router.parsing import json_object, validate, without_neutral

MAX_BLOCKS = 65_536


class CacheControl(Strict):
    """A hint; prefixes are cached by themselves."""

    type: Literal["ephemeral"]
    ttl: str | None = None


class Block(Strict):
    """What all blocks may have."""

    cache_control: CacheControl | None = None


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ToolUseBlock(Block):
    """A call in an assistant's earlier turn."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=256)]
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What came of a call."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=256)]
    content: str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    """Reasoning in an assistant's earlier turn."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


AnyBlock = Annotated[
    TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock, Field(discriminator="type")
]


class Turn(Strict):
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[AnyBlock], Field(min_length=1, max_length=MAX_BLOCKS)]


class ToolSpec(Block):
    """A tool of the client's own."""

    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoiceSpec(Strict):
    """Which tools may or must be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class Metadata(Strict):
    """A label; changes nothing."""

    user_id: str | None = None


class OutputFormat(Strict):
    """Structured output."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """How the answer has to be."""

    format: OutputFormat | None = None


class CountBody(Strict):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=MAX_BLOCKS)]
    system: str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS)] | None = None
    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceSpec | None = None


class MessagesBody(CountBody):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Metadata | None = None
    output_config: OutputConfig | None = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "container": (),
    "context_management": (),
    "mcp_servers": ([],),
    "service_tier": ("auto", "standard_only"),
    "thinking": ({"type": "disabled"},),
}


def parse_messages(data: bytes) -> MessagesBody:
    """Raises ApiError."""
    return validate(MessagesBody, without_neutral(json_object(data), NEUTRAL))


def parse_count(data: bytes) -> CountBody:
    """Raises ApiError."""
    return validate(CountBody, without_neutral(json_object(data), NEUTRAL))
