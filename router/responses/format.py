"""Answers in the shape of Responses: one object, or the events that build it.

created in_progress (items, see `router/responses/output.py`)… completed | incomplete | failed
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from router.choice_text import Told
from router.chunks import AnswerFormat, ChoiceResult, TokenDetails, Usage
from router.errors import ApiError
from router.responses.body import ResponsesBody
from router.responses.items import Json
from router.responses.output import Output
from router.tools.pieces import Piece, Said

_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

Keep = Callable[[Json], Awaitable[None]]
"""Keeps a response that has ended."""


@dataclass(frozen=True, slots=True)
class ResponsesFormats:
    """Makes the format of the one answer to `body`."""

    body: ResponsesBody
    keep: Keep
    bytes_prefix: str = ""

    def __call__(
        self,
        id: str,
        model: str,
        created: int,
        details: TokenDetails,
        include_usage: bool = False,
    ) -> AnswerFormat:
        return _ResponsesFormat(f"resp_{id}", model, created, self.body, self.keep)


class _ResponsesFormat:
    """/v1/responses; one request has one choice."""

    def __init__(self, id: str, model: str, created: int, body: ResponsesBody, keep: Keep) -> None:
        self.id = id
        self._asked = _asked(body)
        self._head = {"id": id, "object": "response", "created_at": created, "model": model}
        self._keep = keep
        self._output = Output()
        self._num_events = 0
        self._to_keep: Json | None = None

    def opening(self, index: int, prompt_tokens: Sequence[int]) -> str:
        response = self._response("in_progress")
        return self._events(
            [
                {"type": "response.created", "response": response},
                {"type": "response.in_progress", "response": response},
            ]
        )

    def text(
        self, index: int, text: str, usage: Usage | None, told: list[Told], offset: int
    ) -> str:
        return self.piece(index, Said(text), usage, told) if text else ""

    def echo(self, index: int, text: str, usage: Usage | None, told: list[Told]) -> str:
        raise AssertionError("a response has no echo")

    def piece(self, index: int, piece: Piece, usage: Usage | None, told: list[Told]) -> str:
        return self._events(self._output.add(piece))

    def finish(self, index: int, reason: str, usage: Usage | None, stop: str | None = None) -> str:
        assert usage is not None  # asked for in `translate`
        events, response = self._end(reason, usage)
        return self._events(
            [*events, {"type": f"response.{response['status']}", "response": response}]
        )

    def usage(self, usage: Usage) -> str:
        return ""

    def done(self, usage: Usage) -> bytes:
        return b""

    def error(self, error: ApiError) -> bytes:
        opened = "" if self._num_events else self.opening(0, ())
        events = self._output.end("incomplete")
        response = self._response("failed")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response["error"] = {"code": code, "message": error.message}
        failed = {"type": "response.failed", "response": response}
        return (opened + self._events([*events, failed])).encode()

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        (result,) = results
        for piece in [Said(result.text)] if result.pieces is None else result.pieces:
            self._output.add(piece)
        return self._end(result.finish_reason, usage)[1]

    async def settled(self) -> None:
        """Who is told the end of a response may go on from it at once: it is kept before."""
        if self._to_keep is not None:
            response, self._to_keep = self._to_keep, None
            await self._keep(response)

    def _end(self, reason: str, usage: Usage) -> tuple[list[Json], Json]:
        """The events of the end, and the whole response."""
        status = "incomplete" if reason == "length" else "completed"
        events = self._output.end_all(status)
        response = self._response(status)
        response["usage"] = _usage(usage)
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._to_keep = response
        return events, response

    def _response(self, status: str) -> Json:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": list(self._output.items),
            "usage": None,
            **self._asked,
        }

    def _events(self, events: list[Json]) -> str:
        return "".join(map(self._event, events))

    def _event(self, event: Json) -> str:
        event["sequence_number"] = self._num_events
        self._num_events += 1
        return f"event: {event['type']}\ndata: {_dumps(event)}\n\n"


def _asked(body: ResponsesBody) -> Json:
    """What a response tells of its request, with the defaults that held."""
    told = body.model_dump(by_alias=True, exclude_none=True, include={"tools", "tool_choice"})
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": _text_config(body),
        "tool_choice": told.get("tool_choice", "auto"),
        "tools": [_tool(tool) for tool in told.get("tools", [])],
        "top_logprobs": 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _tool(tool: Json) -> Json:
    """Clients expect these fields whatever was asked."""
    return {"parameters": None, "strict": None, "description": None, **tool}


def _text_config(body: ResponsesBody) -> Json:
    if body.text is None or body.text.format is None:
        return {"format": {"type": "text"}, "verbosity": "medium"}
    format = body.text.format.model_dump(by_alias=True, exclude_none=True)
    return {"format": format, "verbosity": "medium"}


def _usage(usage: Usage) -> Json:
    """Tokens of reasoning are not counted apart."""
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "cache_write_tokens": 0,
        },
        "output_tokens": usage.num_output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
    }
