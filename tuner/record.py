"""One request as its client saw it, and how a response becomes such a record.

    start          t_first                                       t_last  end
      |--- TTFT -----|--ITL--|--ITL--|--ITL--|  …  |--ITL----------|     |
      |------------------------- end to end ----------------------------|
                     |--------- TPOT · (tokens − 1) ---------------|

The reader is told the time with every piece of data; it has no clock and no socket.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tuner.sse import SseError, SseParser


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """Times are seconds on one clock; `error` is None exactly if the response was complete."""

    index: int
    due: float  # when the schedule wanted it sent
    start: float
    end: float
    chunk_times: tuple[float, ...] = ()  # of chunks that carried output
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None  # a kind, see `docs/bench.md`
    message: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)  # of the TTFT in ms, as told by it

    @property
    def ttft(self) -> float | None:
        return self.chunk_times[0] - self.start if self.chunk_times else None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for fewer than two tokens."""
        if len(self.chunk_times) < 2 or self.output_tokens < 2:
            return None
        return (self.chunk_times[-1] - self.chunk_times[0]) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        return [after - before for before, after in pairwise(self.chunk_times)]

    @property
    def e2e(self) -> float:
        return self.end - self.start


class ProtocolError(Exception):
    """The response is not what the API promises; `kind` names how."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(slots=True)
class StreamReader:
    """Collects one streamed response."""

    chunk_times: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    usage_tokens: int | None = None
    finished: bool = False  # a finish reason was seen
    done: bool = False  # "[DONE]" was seen
    phases: dict[str, float] = field(default_factory=dict)  # see RequestRecord
    _sse: SseParser = field(default_factory=SseParser)

    @property
    def output_tokens(self) -> int:
        """As the server counted them; else one per chunk."""
        return len(self.chunk_times) if self.usage_tokens is None else self.usage_tokens

    def feed(self, data: bytes, now: float) -> None:
        """Take bytes that arrived at `now`.

        Raises:
            ProtocolError: the stream is malformed or reports an error.
        """
        try:
            events = self._sse.feed(data)
        except SseError as error:
            raise ProtocolError("bad_stream", str(error)) from error
        for event in events:
            if event == "[DONE]":
                self.done = True
            else:
                self._take(_json_object(event), now)

    def close(self) -> None:
        """The body has ended.

        Raises:
            ProtocolError: it ended too early.
        """
        if not (self.done and self.finished):
            missing = "finish reason" if self.done else "[DONE]"
            raise ProtocolError("truncated", f"the stream ended without a {missing}")

    def _take(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            raise ProtocolError("stream_error", error_text(event))
        self._take_usage(event.get("usage"))
        choices = _choices(event)
        self.finished |= any(choice.get("finish_reason") for choice in choices)
        if any(_has_output(choice) for choice in choices):
            self.chunk_times.append(now)

    def _take_usage(self, usage: Any) -> None:
        """A count that is missing or no number stays unknown."""
        if not isinstance(usage, dict):
            return
        prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens")
        self.prompt_tokens = prompt if type(prompt) is int else self.prompt_tokens
        self.usage_tokens = output if type(output) is int else self.usage_tokens


def _choices(event: Mapping[str, Any]) -> list[dict[str, Any]]:
    choices = event.get("choices") or []
    if not isinstance(choices, list):
        raise ProtocolError("bad_stream", "choices is not a list")
    return [choice for choice in choices if isinstance(choice, dict)]


def server_phases(header: str) -> dict[str, float]:
    """Milliseconds by name of a `Server-Timing` header, up to its `ttft`; none without one.

    What is no number, or without a duration, is passed over: the header is the server's to shape.
    """
    names, found = header.partition("ttft;")[::2]
    entries = (entry.strip().partition(";dur=") for entry in names.split(",") if found)
    phases: dict[str, float] = {}
    for name, _, text in entries:
        try:
            phases[name] = phases.get(name, 0.0) + float(text)
        except ValueError:
            continue
    return phases


# `reasoning` is what newer servers call `reasoning_content`.
_OUTPUT = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


def _has_output(choice: Mapping[str, Any]) -> bool:
    """Whether a chunk carries text or part of a tool call; a chunk with only the role does not."""
    if choice.get("text"):
        return True
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return False
    return any(delta.get(key) for key in _OUTPUT)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ProtocolError("bad_stream", f"an event is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError("bad_stream", "an event is not a JSON object")
    return value


def error_text(body: Any) -> str:
    """The message of an error in OpenAI's shape, or in a near relative of it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message", error.get("detail", error))
    return str(error)[:500]
