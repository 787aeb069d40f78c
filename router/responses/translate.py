"""From the body of a response to the chat body that everything behind it knows."""

from __future__ import annotations

from typing import Any

from router.api_chat import ChatBody
from router.errors import ApiError, bad_request
from router.parsing import validate
from router.responses.body import AllowedTools, ChosenFunction, ResponsesBody, TextFormat
from router.responses.items import (
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputText,
    Message,
    OutputText,
    Reasoning,
    Refusal,
)

Turn = dict[str, Any]

_SAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stream",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "priority",
    "cache_salt",
    "chat_template_kwargs",
    "structured_outputs",
    "parallel_tool_calls",
    "user",
    "safety_identifier",
    "metadata",
)

# What the chat body calls otherwise; the longer names first.
_NAMES = (
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format.json_schema", "text.format.schema"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
)


def as_chat(body: ResponsesBody, earlier: list[InputItem]) -> ChatBody:
    """`earlier` is the conversation before this input. Raises ApiError."""
    given = (
        [Message(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    )
    turns: list[Turn] = []
    if body.instructions:
        turns.append({"role": "system", "content": body.instructions})
    for item in [*earlier, *given]:
        _add(item, turns)
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields |= {"messages": turns, "max_tokens": body.max_output_tokens, **_tools(body)}
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _response_format(body.text.format)
    if body.stream:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return validate(ChatBody, fields)


def in_our_words(error: ApiError) -> ApiError:
    """An error about the chat body, about the response's own."""
    for chat, ours in _NAMES:
        if error.param is not None and error.param.startswith(chat):
            error.param = ours + error.param.removeprefix(chat)
            error.message = error.message.replace(f"`{chat}", f"`{ours}")
            break
    return error


# ------------------------------------------------------------ turns


def _add(item: InputItem, turns: list[Turn]) -> None:
    """Reasoning, text and calls that follow each other are one turn of the assistant's."""
    match item:
        case Message(role="assistant"):
            turn = _assistant(turns, before=("content", "tool_calls"))
            turn["content"] = _text(item.content)
        case Message(role="user"):
            turns.append({"role": "user", "content": _text(item.content)})
        case Message():
            _instruct(item.role, _text(item.content), turns)
        case Reasoning():
            turn = _assistant(turns, before=("reasoning_content", "content", "tool_calls"))
            parts = item.content or item.summary
            turn["reasoning_content"] = "\n".join(part.text for part in parts)
        case FunctionCall():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(turns).setdefault("tool_calls", []).append(call)
        case FunctionCallOutput():
            text = _text(item.output)
            turns.append({"role": "tool", "tool_call_id": item.call_id, "content": text})


def _instruct(role: str, text: str, turns: list[Turn]) -> None:
    """Instructions that begin the conversation are one turn: many templates allow no second one."""
    if len(turns) == 1 and turns[0]["role"] in ("system", "developer"):
        turns[0]["content"] += f"\n\n{text}"
    else:
        turns.append({"role": role, "content": text})


def _assistant(turns: list[Turn], before: tuple[str, ...] = ()) -> Turn:
    """The assistant's turn that is being told, unless it already has what must come later."""
    last = turns[-1] if turns else {}
    if last.get("role") != "assistant" or any(last.get(name) for name in before):
        turns.append({"role": "assistant", "content": ""})
    return turns[-1]


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "\n".join(map(_part_text, content))


def _part_text(part: InputText | OutputText | Refusal) -> str:
    return part.refusal if isinstance(part, Refusal) else part.text


# ------------------------------------------------------------ tools and format


def _tools(body: ResponsesBody) -> dict[str, Any]:
    tools, choice = body.tools or [], body.tool_choice
    chosen: Any = choice
    if isinstance(choice, ChosenFunction):
        chosen = {"type": "function", "function": {"name": choice.name}}
    if isinstance(choice, AllowedTools):
        names = {tool.name for tool in choice.tools}
        if unknown := names - {tool.name for tool in tools}:
            raise bad_request(f"`tool_choice` names no tool: {min(unknown)}", "tool_choice")
        tools, chosen = [tool for tool in tools if tool.name in names], choice.mode
    functions = [tool.model_dump(exclude={"type"}, exclude_none=True) for tool in tools]
    listed = [{"type": "function", "function": function} for function in functions]
    return {"tools": listed or None, "tool_choice": chosen}


def _response_format(format: TextFormat) -> dict[str, Any]:
    if format.type != "json_schema":
        return {"type": format.type}
    if format.schema_ is None:
        raise bad_request("Missing required parameter: `text.format.schema`.", "text.format.schema")
    schema = {"name": format.name, "schema": format.schema_, "strict": format.strict}
    return {"type": "json_schema", "json_schema": schema}
