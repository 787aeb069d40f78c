"""Answers in OpenAI's shapes: whole objects, and the events of a stream.

    data: {"id":…,"object":…,"created":…,"model":…,"choices":[…]}⏎⏎     … data: [DONE]⏎⏎

Everything that is the same in all events of a request is formatted once; an event then costs one
string escape and one concatenation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from json.encoder import encode_basestring as quote
from typing import Any, Protocol

from router.errors import ApiError

DONE = b"data: [DONE]\n\n"
_dumps = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_output_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }


@dataclass(slots=True)
class ChoiceResult:
    """One finished choice of an answer that is not streamed."""

    index: int
    text: str
    finish_reason: str
    token_ids: tuple[int, ...] | None = None  # where the client asked for them

    def end(self) -> dict[str, Any]:
        """The fields that both formats end a choice with."""
        end: dict[str, Any] = {"logprobs": None, "finish_reason": self.finish_reason}
        return end if self.token_ids is None else {**end, "token_ids": self.token_ids}


class AnswerFormat(Protocol):
    """Completions or chat."""

    id: str

    def opening(self, index: int) -> str:
        """What precedes a choice's first text."""
        ...

    def text(self, index: int, text: str, usage: Usage | None) -> str:
        """The event for new text."""
        ...

    def finish(self, index: int, reason: str, usage: Usage | None) -> str:
        """The last event of a choice."""
        ...

    def usage(self, usage: Usage) -> str:
        """The event after all choices, if the client asked for it."""
        ...

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""
        ...


class _Format:
    """What both formats share: the head of every event, and usage at its end."""

    _prefix: str
    _kind: str
    _chunk_kind: str

    def __init__(self, id: str, model: str, created: int, include_usage: bool = False) -> None:
        self.id = f"{self._prefix}-{id}"
        self._common = {"created": created, "model": model}
        head = _dumps({"id": self.id, "object": self._chunk_kind, **self._common})[:-1]
        self._head = f'data: {head},"choices":['
        self._no_usage = ',"usage":null' if include_usage else ""

    def _event(self, choice: str, usage: Usage | None) -> str:
        tail = self._no_usage if usage is None else f',"usage":{_dumps(usage.as_dict())}'
        return f"{self._head}{choice}]{tail}}}\n\n"

    def usage(self, usage: Usage) -> str:
        return self._event("", usage)

    def _object(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self._kind,
            **self._common,
            "choices": choices,
            "usage": usage.as_dict(),
        }


class CompletionFormat(_Format):
    """/v1/completions."""

    _prefix = "cmpl"
    _kind = _chunk_kind = "text_completion"

    def opening(self, index: int) -> str:
        return ""

    def text(self, index: int, text: str, usage: Usage | None) -> str:
        choice = f'{{"index":{index},"text":{quote(text)},"logprobs":null,"finish_reason":null}}'
        return self._event(choice, usage)

    def finish(self, index: int, reason: str, usage: Usage | None) -> str:
        choice = f'{{"index":{index},"text":"","logprobs":null,"finish_reason":"{reason}"}}'
        return self._event(choice, usage)

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        choices = [
            {"index": result.index, "text": result.text, **result.end()} for result in results
        ]
        return self._object(choices, usage)


class ChatFormat(_Format):
    """/v1/chat/completions."""

    _prefix = "chatcmpl"
    _kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"

    def opening(self, index: int) -> str:
        return self._delta(index, '{"role":"assistant","content":""}', "null", None)

    def text(self, index: int, text: str, usage: Usage | None) -> str:
        return self._delta(index, f'{{"content":{quote(text)}}}', "null", usage)

    def finish(self, index: int, reason: str, usage: Usage | None) -> str:
        return self._delta(index, "{}", f'"{reason}"', usage)

    def _delta(self, index: int, delta: str, reason: str, usage: Usage | None) -> str:
        choice = f'{{"index":{index},"delta":{delta},"logprobs":null,"finish_reason":{reason}}}'
        return self._event(choice, usage)

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": result.index,
                "message": {"role": "assistant", "content": result.text, "refusal": None},
                **result.end(),
            }
            for result in results
        ]
        return self._object(choices, usage)


def error_event(error: ApiError) -> bytes:
    """An error after the first byte: an event of its own, then the end of the stream."""
    return b"data: " + error.body_bytes() + b"\n\n" + DONE
