"""What a chat request says of tools, as the template, the grammar and the reader need it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from router.api_tools import NamedTool, Tool, ToolChoice
from router.errors import bad_request

MAX_CALLS = 16
"""Calls that a required answer may consist of: a weak model would go on to its limit."""

TOOL_WHITESPACE = " ?"
"""Between the parts of calls that must be made: what may stand there a weak model will write."""

_OPENING = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("allOf", "anyOf", "oneOf", "not", "if", "$ref", "$dynamicRef", "dependentSchemas"),
}
"""What may have more to say of an object's properties."""

PREAMBLE = """You may call functions. Their signatures, in <tools></tools>:
<tools>
{tools}
</tools>

For each call answer with a JSON object in <tool_call></tool_call>:
<tool_call>
{{"name": <function>, "arguments": <object>}}
</tool_call>"""
"""For templates that know no tools; in Hermes' format."""


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request; `rendered` is empty where it may use none."""

    rendered: tuple[dict[str, Any], ...] = ()
    schema: dict[str, Any] | None = None  # what the answer must be
    named: str | None = None
    required: bool = False
    strict: tuple[Tool, ...] = ()  # calls need not be, but if they are they keep to these


NO_TOOLS = ToolUse()


def tool_use(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool | None) -> ToolUse:
    """Raises ApiError for a choice that the tools do not allow."""
    tools = tools or []
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("Two tools have the same name.", "tools")
    if not tools and choice not in (None, "none", "auto"):
        raise bad_request("`tool_choice` needs `tools`.", "tool_choice")
    if not tools or choice == "none":
        return NO_TOOLS
    rendered = tuple(tool.model_dump(exclude_none=True) for tool in tools)
    if isinstance(choice, NamedTool):
        return _named(tools, rendered, choice.function.name)
    if choice == "required":
        return ToolUse(rendered, _array_schema(tools, parallel is not False), required=True)
    return ToolUse(rendered, strict=_if_any_is_strict(tools))


def _if_any_is_strict(tools: list[Tool]) -> tuple[Tool, ...]:
    return tuple(tools) if any(tool.function.strict for tool in tools) else ()


def _named(tools: list[Tool], rendered: tuple[dict[str, Any], ...], name: str) -> ToolUse:
    for tool in tools:
        if tool.function.name == name:
            return ToolUse(rendered, _parameters(tool), named=name)
    raise bad_request(f"`tool_choice` names no tool: {name}", "tool_choice")


def _array_schema(tools: list[Tool], parallel: bool) -> dict[str, Any]:
    """`[{"name": …, "parameters": …}, …]`"""
    call = calls_schema(tools, "parameters")
    return {
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_CALLS if parallel else 1,
        "items": {"anyOf": call["anyOf"]},
        "$defs": call["$defs"],
    }


def calls_schema(tools: list[Tool], key: str) -> dict[str, Any]:
    """`{"name": …, key: …}` for each tool; its own references are moved with its parameters."""
    calls, definitions = [], {}
    for tool in tools:
        name = tool.function.name
        definitions[name] = _moved(_parameters(tool), f"#/$defs/{name}")
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": name},
                    key: {"$ref": f"#/$defs/{name}"},
                },
                "required": ["name", key],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


def _parameters(tool: Tool) -> dict[str, Any]:
    """A function's arguments are always an object.

    One that lists its properties has no others, unless it says so: a weak model would invent
    arguments until its limit.
    """
    schema = {"type": "object", **(tool.function.parameters or {"properties": {}})}
    if "properties" in schema and not _OPENING & schema.keys():
        schema["additionalProperties"] = False
    return schema


def _moved(schema: Any, to: str) -> Any:
    """`schema` with its references to itself pointing below `to`."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, to) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = to + reference[1:]
    return moved


def preamble(tools: tuple[dict[str, Any], ...]) -> str:
    """The tools, told to a model whose template cannot."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return PREAMBLE.format(tools=lines)
