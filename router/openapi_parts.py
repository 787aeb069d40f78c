"""Parts of the OpenAPI description: what answers consist of, and the events of streams."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


def object_of(optional: Json | None = None, **properties: Json) -> Json:
    return {
        "type": "object",
        "properties": {**properties, **(optional or {})},
        "required": list(properties),
    }


def list_of(items: Json) -> Json:
    return {"type": "array", "items": items}


def const(value: str) -> Json:
    return {"const": value}


TEXT: Json = {"type": "string"}
COUNT: Json = {"type": "integer", "minimum": 0}
MAYBE_TEXT: Json = {"type": ["string", "null"]}
MAYBE_OBJECT: Json = {"type": ["object", "null"]}
FINISH: Json = {"enum": ["stop", "length", "tool_calls"]}

_FUNCTION = object_of(name=TEXT, arguments=TEXT)
TOOL_CALL = object_of(id=TEXT, type=const("function"), function=_FUNCTION)
_MESSAGE_PART = object_of(type={"enum": ["output_text", "reasoning_text"]}, text=TEXT)
OUTPUT_ITEM: Json = {
    "oneOf": [
        object_of(
            type=const("message"),
            id=TEXT,
            role=const("assistant"),
            status=TEXT,
            content=list_of(_MESSAGE_PART),
        ),
        object_of(
            type=const("function_call"),
            id=TEXT,
            call_id=TEXT,
            name=TEXT,
            arguments=TEXT,
            status=TEXT,
        ),
        object_of(
            type=const("reasoning"),
            id=TEXT,
            status=TEXT,
            summary=list_of({}),
            content=list_of(_MESSAGE_PART),
        ),
    ]
}
BLOCK: Json = {
    "oneOf": [
        object_of(type=const("text"), text=TEXT),
        object_of(type=const("thinking"), thinking=TEXT, signature=TEXT),
        object_of(type=const("tool_use"), id=TEXT, name=TEXT, input={"type": "object"}),
    ]
}


def _chunk(kind: str, **choice: Json) -> Json:
    """An event of completions or chat; the last one may have usage and no choice."""
    finish = {"anyOf": [FINISH, {"type": "null"}]}
    described = object_of(index=COUNT, logprobs=MAYBE_OBJECT, finish_reason=finish, **choice)
    return object_of(
        {"usage": MAYBE_OBJECT},
        id=TEXT,
        object=const(kind),
        created=COUNT,
        model=TEXT,
        choices=list_of(described),
    )


_CALL_DELTA = object_of(
    {"id": TEXT, "type": const("function")},
    index=COUNT,
    function=object_of({"name": TEXT}, arguments=TEXT),
)
_DELTA = object_of(
    {
        "role": const("assistant"),
        "content": TEXT,
        "reasoning_content": TEXT,
        "tool_calls": list_of(_CALL_DELTA),
    }
)


def _responses_event(type: str, **more: Json) -> Json:
    return object_of(type=const(f"response.{type}"), sequence_number=COUNT, **more)


def _responses_events() -> list[Json]:
    whole = {"response": {"type": "object"}}
    item = {"output_index": COUNT}
    part = {**item, "item_id": TEXT, "content_index": COUNT}
    call = {**item, "item_id": TEXT}
    return [
        *(
            _responses_event(name, **whole)
            for name in ("created", "in_progress", "completed", "incomplete", "failed")
        ),
        *(_responses_event(f"output_item.{end}", **item, item=OUTPUT_ITEM) for end in ENDS),
        *(_responses_event(f"content_part.{end}", **part, part=_MESSAGE_PART) for end in ENDS),
        _responses_event("output_text.delta", **part, delta=TEXT, logprobs=list_of({})),
        _responses_event("output_text.done", **part, text=TEXT, logprobs=list_of({})),
        _responses_event("reasoning_text.delta", **part, delta=TEXT),
        _responses_event("reasoning_text.done", **part, text=TEXT),
        _responses_event("function_call_arguments.delta", **call, delta=TEXT),
        _responses_event("function_call_arguments.done", **call, name=TEXT, arguments=TEXT),
    ]


ENDS = ("added", "done")
_BLOCK_DELTA: Json = {
    "oneOf": [
        object_of(type=const("text_delta"), text=TEXT),
        object_of(type=const("thinking_delta"), thinking=TEXT),
        object_of(type=const("input_json_delta"), partial_json=TEXT),
    ]
}
_MESSAGE_EVENTS: list[Json] = [
    object_of(type=const("message_start"), message={"type": "object"}),
    object_of(type=const("content_block_start"), index=COUNT, content_block=BLOCK),
    object_of(type=const("content_block_delta"), index=COUNT, delta=_BLOCK_DELTA),
    object_of(type=const("content_block_stop"), index=COUNT),
    object_of(
        type=const("message_delta"),
        delta=object_of(stop_reason=TEXT, stop_sequence=MAYBE_TEXT),
        usage={"type": "object"},
    ),
    object_of(type=const("message_stop")),
    object_of(type=const("error"), error=object_of(type=TEXT, message=TEXT)),
]

EVENTS: Json = {
    "CompletionEvent": _chunk("text_completion", text=TEXT),
    "ChatCompletionEvent": _chunk("chat.completion.chunk", delta=_DELTA),
    "ResponseEvent": {"oneOf": _responses_events()},
    "MessageEvent": {"oneOf": _MESSAGE_EVENTS},
}
