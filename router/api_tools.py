"""What a chat body says of tools: those that the model may call, and calls that were made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from router.api_structured import Strict

MAX_TOOLS = 256

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]


class FunctionSpec(Strict):
    """A function as the model sees it; without `parameters` it takes none."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One tool."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Strict):
    """Which function must be called."""

    name: ToolName


class NamedTool(Strict):
    """A tool_choice that names a function."""

    type: Literal["function"]
    function: FunctionName


class MadeCallFunction(Strict):
    """The arguments are JSON, as the model wrote it."""

    name: ToolName
    arguments: str


class MadeCall(Strict):
    """A call in an assistant's earlier turn."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: MadeCallFunction
    index: int | None = None  # some clients send a stream's deltas back


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)]
MadeCalls = Annotated[list[MadeCall], Field(max_length=MAX_TOOLS, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool
