"""The body of a chat request; see `router/api.py`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from router.api import (
    NEUTRAL_COMMON,
    GenerationBody,
    NumLogprobs,
    PositiveInt,
    known_fields,
)
from router.api_structured import Strict
from router.api_tools import MadeCalls, ToolChoice, Tools
from router.parsing import validate, without_neutral

MAX_MESSAGES = 65_536
MAX_TEMPLATE_CHARS = 65_536


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        str
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
        | None
    ) = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: MadeCalls | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_what_its_role_needs(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("`content` is missing")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content):
            raise ValueError("only an assistant's message may have calls or reasoning")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("`tool_call_id` belongs to the role `tool`")
        return self


Messages = Annotated[
    list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
]


class ChatRendering(Strict):
    """How a conversation becomes a prompt."""

    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatBody(GenerationBody, ChatRendering):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_COMMON,
    "audio": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "refusal": (),
}


def parse_chat(data: bytes) -> ChatBody:
    """The body of a chat request. Raises ApiError."""
    return validate(ChatBody, with_known_messages(known_fields(data, NEUTRAL_CHAT)))


def with_known_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields` with nothing in their messages that asks for nothing. Raises ApiError."""
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    known = [
        without_neutral(message, NEUTRAL_MESSAGE, f"messages.{index}.")
        if isinstance(message, dict)
        else message
        for index, message in enumerate(messages)
    ]
    return {**fields, "messages": known}
