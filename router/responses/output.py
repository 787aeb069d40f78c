"""The output of one response: its items, and the events that build them.

    output_item.added (content_part.added …delta… …done content_part.done) output_item.done

A call has no parts: its arguments' deltas and their end stand between the item's two events.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from router.responses.items import Json, new_id
from router.tools.pieces import Arguments, Called, Piece, Said, Thought

_TEXT = {Said: "output_text", Thought: "reasoning_text"}


@dataclass(slots=True)
class _Open:
    """The item that is being told."""

    kind: type[Piece]
    item: Json
    texts: list[str]

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Output:
    """Takes the pieces of an answer; what it gives are events, without their numbers."""

    def __init__(self) -> None:
        self.items: list[Json] = []  # whole ones
        self._open: _Open | None = None

    def add(self, piece: Piece) -> list[Json]:
        match piece:
            case Said(text):
                kind = "response.output_text.delta"
                events, more = self._begin(Said), {"delta": text, "logprobs": []}
            case Thought(text):
                kind = "response.reasoning_text.delta"
                events, more = self._begin(Thought), {"delta": text}
            case Called(name):
                return [*self.end(), *self._begin(Called, name)]
            case Arguments(text):
                kind = "response.function_call_arguments.delta"
                events, more = [], {"delta": text}
        assert self._open is not None
        self._open.texts.append(text)
        return [*events, self._of_part(kind, **more)]

    def end(self, status: str = "completed") -> list[Json]:
        """The item that is open is whole; `incomplete` if a limit has cut it."""
        if self._open is None:
            return []
        opened, self._open = self._open, None
        place = {"item_id": opened.item["id"], "output_index": len(self.items)}
        if opened.kind is Called:
            opened.item["arguments"] = opened.text
            events = [_arguments_done(opened, place)]
        else:
            events = _part_done(opened, place | {"content_index": 0})
        opened.item["status"] = status
        self.items.append(opened.item)
        index = place["output_index"]
        return [
            *events,
            {"type": "response.output_item.done", "output_index": index, "item": opened.item},
        ]

    def end_all(self, status: str) -> list[Json]:
        """No piece follows. An answer of nothing is a message without text."""
        begun = [] if self.items or self._open is not None else self._begin(Said)
        return [*begun, *self.end(status)]

    def _begin(self, kind: type[Piece], name: str = "") -> list[Json]:
        """The start of an item, unless one of this kind is open."""
        if self._open is not None and self._open.kind is kind:
            return []
        ended = self.end()
        item = _new_item(kind, name)
        self._open = _Open(kind, item, [])
        added = {
            "type": "response.output_item.added",
            "output_index": len(self.items),
            "item": {**item, "content": []} if "content" in item else dict(item),
        }
        if kind is Called:
            return [*ended, added]
        part = self._of_part("response.content_part.added", part=_part(kind, ""))
        return [*ended, added, part]

    def _of_part(self, type: str, **more: Any) -> Json:
        assert self._open is not None
        place: Json = {"item_id": self._open.item["id"], "output_index": len(self.items)}
        if self._open.kind is not Called:
            place["content_index"] = 0
        return {"type": type, **place, **more}


def _new_item(kind: type[Piece], name: str) -> Json:
    if kind is Called:
        call_id = f"call_{secrets.token_hex(12)}"
        call = {"type": "function_call", "call_id": call_id, "name": name, "arguments": ""}
        return {"id": new_id("function_call"), "status": "in_progress", **call}
    if kind is Thought:
        thoughts = {"type": "reasoning", "summary": [], "content": []}
        return {"id": new_id("reasoning"), "status": "in_progress", **thoughts}
    message = {"type": "message", "role": "assistant", "content": []}
    return {"id": new_id("message"), "status": "in_progress", **message}


def _part(kind: type[Piece], text: str) -> Json:
    beside: Json = {"annotations": [], "logprobs": []} if kind is Said else {}
    return {"type": _TEXT[kind], "text": text, **beside}


def _part_done(opened: _Open, place: Json) -> list[Json]:
    kind, text = opened.kind, opened.text
    part = _part(kind, text)
    opened.item["content"] = [part]
    beside: Json = {"logprobs": []} if kind is Said else {}
    return [
        {"type": f"response.{_TEXT[kind]}.done", **place, "text": text, **beside},
        {"type": "response.content_part.done", **place, "part": part},
    ]


def _arguments_done(opened: _Open, place: Json) -> Json:
    return {
        "type": "response.function_call_arguments.done",
        **place,
        "name": opened.item["name"],
        "arguments": opened.text,
    }
