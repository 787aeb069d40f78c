"""From Anthropic's body to the chat body that everything behind it knows."""

from __future__ import annotations

import json
from typing import Any

from router.anthropic.body import (
    CountBody,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolChoiceSpec,
    ToolResultBlock,
    ToolSpec,
    ToolUseBlock,
    Turn,
)
from router.api_chat import ChatBody
from router.errors import bad_request
from router.parsing import validate


def as_chat(body: CountBody) -> ChatBody:
    """Raises ApiError."""
    fields: dict[str, Any] = {"model": body.model, "messages": _messages(body)}
    if body.messages[-1].role == "assistant":  # the answer goes on from there
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if body.tools:
        fields["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice)
    if isinstance(body, MessagesBody):
        fields |= _sampling(body)
    return validate(ChatBody, fields)


def _sampling(body: MessagesBody) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stream": body.stream,
    }
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.stream:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return fields


def _tool(tool: ToolSpec) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoiceSpec) -> dict[str, Any]:
    if (choice.type == "tool") != (choice.name is not None):
        raise bad_request("`tool_choice.name` belongs to the type `tool`.", "tool_choice.name")
    chosen: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.name is not None:
        chosen = {"type": "function", "function": {"name": choice.name}}
    parallel = False if choice.disable_parallel_tool_use else None
    return {"tool_choice": chosen, "parallel_tool_calls": parallel}


def _messages(body: CountBody) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    if body.system:
        turns.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        turns += _turns(message)
    return turns


def _turns(message: Turn) -> list[dict[str, Any]]:
    """Results of calls are turns of their own, before what else a user says."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    turns: list[dict[str, Any]] = []
    texts: list[str] = []
    turn: dict[str, Any] = {"role": message.role}
    for block in message.content:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                turn["reasoning_content"] = turn.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                turn.setdefault("tool_calls", []).append(_call(block))
            case ToolResultBlock():
                turns.append(_result(block))
    if texts or len(turn) > 1:
        turns.append({**turn, "content": "\n".join(texts)})
    return turns


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _result(block: ToolResultBlock) -> dict[str, Any]:
    text = _text(block.content or "")
    if block.is_error:
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": text}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)
