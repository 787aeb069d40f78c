"""Items of a conversation, as clients send them and as they are told and kept."""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter

from router.api_structured import Strict
from router.api_tools import ToolName

MAX_ITEMS = 65_536

Json = dict[str, Any]
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco"}


class InputText(Strict):
    """Text of a user, or of the instructions."""

    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """Text of the model; what was told beside it is not read back."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Strict):
    """What another model has said instead."""

    type: Literal["refusal"]
    refusal: str


class ReasoningText(Strict):
    """A part of a model's reasoning."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


Part = Annotated[InputText | OutputText | Refusal, Field(discriminator="type")]
Parts = Annotated[list[Part], Field(max_length=MAX_ITEMS, fail_fast=True)]


class Item(Strict):
    """What all items may have."""

    id: Annotated[str, Field(max_length=256)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class Message(Item):
    """A turn, or a part of one."""

    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: str | Annotated[Parts, Field(min_length=1)]
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCall(Item):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=256)]
    name: ToolName
    arguments: str


class FunctionCallOutput(Item):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=256)]
    output: str | Annotated[list[InputText], Field(max_length=MAX_ITEMS, fail_fast=True)]


class Reasoning(Item):
    """The model's reasoning before what follows."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Field(max_length=MAX_ITEMS)]
    content: Annotated[list[ReasoningText], Field(max_length=MAX_ITEMS)] | None = None
    encrypted_content: None = None


def _kind(value: Any) -> str:
    """A message need not say that it is one. The tags of a union do not show in errors."""
    if isinstance(value, dict):
        return f"a-{value.get('type', 'message')}"
    return f"a-{getattr(value, 'type', None)}"


InputItem = Annotated[
    Annotated[Message, Tag("a-message")]
    | Annotated[FunctionCall, Tag("a-function_call")]
    | Annotated[FunctionCallOutput, Tag("a-function_call_output")]
    | Annotated[Reasoning, Tag("a-reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="`type` must be message, function_call, function_call_output "
        "or reasoning",
    ),
]
Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
_KEPT: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])


def kept_items(items: list[Json]) -> list[InputItem]:
    """Items of earlier responses, as they were kept."""
    return _KEPT.validate_python(items)


def told_items(given: str | list[InputItem]) -> list[Json]:
    """An input as it is kept and told: a list of items with ids, and parts in messages."""
    if isinstance(given, str):
        given = [Message(role="user", content=given)]
    return [_told(item) for item in given]


def new_id(kind: str) -> str:
    """For an item of this type."""
    return f"{_PREFIXES.get(kind, 'rs')}_{secrets.token_hex(16)}"


def _told(item: InputItem) -> Json:
    told: Json = item.model_dump(exclude_none=True)
    if isinstance(item, Message) and isinstance(item.content, str):
        told["content"] = [_part(item.role, item.content)]
    return {"status": "completed", **told, "id": item.id or new_id(item.type)}


def _part(role: str, text: str) -> Json:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}
