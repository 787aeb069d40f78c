"""Answers in Anthropic's shapes: a message of blocks, or the events that build it.

message_start (content_block_start content_block_delta… content_block_stop)… message_delta
message_stop
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from router.anthropic.errors import error_object
from router.choice_text import Told
from router.chunks import ChoiceResult, TokenDetails, Usage
from router.errors import ApiError
from router.tools.pieces import Arguments, Called, Piece, Said, Thought

_dumps = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesFormat:
    """/v1/messages; one request has one choice."""

    bytes_prefix = ""

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        details: TokenDetails,
        include_usage: bool = False,
    ) -> None:
        self.id = f"msg_{id}"
        self._model = model
        self._num_blocks = 0
        self._open: type[Piece] | None = None  # the kind of the block that is being told
        self._has_called = False

    def opening(self, index: int, prompt_tokens: Sequence[int]) -> str:
        usage = _usage(Usage(len(prompt_tokens), 0, 0))
        return _event({"type": "message_start", "message": self._message([], None, None, usage)})

    def text(
        self, index: int, text: str, usage: Usage | None, told: list[Told], offset: int
    ) -> str:
        return self.piece(index, Said(text), usage, told) if text else ""

    def echo(self, index: int, text: str, usage: Usage | None, told: list[Told]) -> str:
        raise AssertionError("a message has no echo")

    def piece(self, index: int, piece: Piece, usage: Usage | None, told: list[Told]) -> str:
        match piece:
            case Said(text):
                head = self._begin(Said, {"type": "text", "text": ""})
                delta = {"type": "text_delta", "text": text}
            case Thought(text):
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                head = self._begin(Thought, empty)
                delta = {"type": "thinking_delta", "thinking": text}
            case Called(name):
                self._has_called = True
                return self._end_block() + self._begin(Called, _tool_use(name, {}))
            case Arguments(text):
                head, delta = "", {"type": "input_json_delta", "partial_json": text}
        return head + self._block_event("content_block_delta", delta=delta)

    def finish(self, index: int, reason: str, usage: Usage | None, stop: str | None = None) -> str:
        assert usage is not None  # asked for in `translate`
        delta = {"stop_reason": self._reason(reason, stop), "stop_sequence": stop}
        end = {"type": "message_delta", "delta": delta, "usage": _usage(usage)}
        return self._end_block() + _event(end) + _event({"type": "message_stop"})

    def usage(self, usage: Usage) -> str:
        return ""

    def done(self, usage: Usage) -> bytes:
        return b""

    async def settled(self) -> None:
        """Nothing is to be done before."""

    def error(self, error: ApiError) -> bytes:
        return _event(error_object(error)).encode()

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        (result,) = results
        blocks: list[dict[str, Any]] = []
        for piece in [Said(result.text)] if result.pieces is None else result.pieces:
            match piece:
                case Said(text):
                    blocks.append({"type": "text", "text": text})
                case Thought(text):
                    blocks.append({"type": "thinking", "thinking": text, "signature": ""})
                case Called(name):
                    self._has_called = True
                    blocks.append(_tool_use(name, {}))
                case Arguments(text):
                    blocks[-1]["input"] = _as_object(text)
        reason = self._reason(result.finish_reason, result.stop)
        return self._message(blocks, reason, result.stop, _usage(usage))

    def _reason(self, reason: str, stop: str | None) -> str:
        if stop is not None:
            return "stop_sequence"
        return "tool_use" if self._has_called and reason == "stop" else _REASONS[reason]

    def _message(
        self,
        content: list[dict[str, Any]],
        reason: str | None,
        stop: str | None,
        usage: dict[str, int],
    ) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }

    # ------------------------------------------------------------ blocks of a stream

    def _begin(self, kind: type[Piece], block: dict[str, Any]) -> str:
        """The start of a block, unless one of this kind is open."""
        if self._open is kind:
            return ""
        end = self._end_block()
        self._open = kind
        return end + self._block_event("content_block_start", content_block=block)

    def _end_block(self) -> str:
        if self._open is None:
            return ""
        event = self._block_event("content_block_stop")
        self._open = None
        self._num_blocks += 1
        return event

    def _block_event(self, type: str, **fields: Any) -> str:
        return _event({"type": type, "index": self._num_blocks, **fields})


def _event(data: dict[str, Any]) -> str:
    return f"event: {data['type']}\ndata: {_dumps(data)}\n\n"


def _tool_use(name: str, input: dict[str, Any]) -> dict[str, Any]:
    id = f"toolu_{secrets.token_hex(12)}"
    return {"type": "tool_use", "id": id, "name": name, "input": input}


def _as_object(arguments: str) -> Any:
    """The arguments of a call; one that a limit has cut is told as its text."""
    try:
        return json.loads(arguments)
    except ValueError:
        return {"partial_json": arguments}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic counts what came from the cache apart."""
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_output_tokens,
    }
