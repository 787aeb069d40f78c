"""Answers in OpenAI's shapes: whole objects, and the events of a stream.

    data: {"id":…,"object":…,"created":…,"model":…,"choices":[…]}⏎⏎     … data: [DONE]⏎⏎

Everything that is the same in all events of a request is formatted once; an event then costs one
string escape and one concatenation.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring as quote
from typing import Any, Protocol

from router.choice_text import Told
from router.errors import ApiError
from router.logprobs import TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs
from router.tools.pieces import Arguments, Called, Piece, Said, Thought

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


@dataclass(frozen=True, slots=True)
class TokenDetails:
    """What a client wants to know of tokens, beside their text."""

    names: TokenNames
    logprobs: int | None = None  # of each output token (and of an echo), and of so many best
    prompt_logprobs: int | None = None
    token_ids: bool = False


@dataclass(slots=True)
class ChoiceResult:
    """One finished choice of an answer that is not streamed."""

    index: int
    text: str
    finish_reason: str
    stop: str | None  # the stop string that ended it
    pieces: list[Piece] | None  # what the text says, if it is not just text
    told: list[Told]  # of the echo too
    num_echoed: int
    prompt_tokens: Sequence[int]
    prompt_rows: Sequence[bytes]

    @property
    def num_details(self) -> int:
        """How many tokens have to be written out beside the text."""
        return len(self.told) + len(self.prompt_rows)


class AnswerFormat(Protocol):
    """Completions or chat."""

    id: str

    def opening(self, index: int, prompt_tokens: Sequence[int]) -> str:
        """What precedes a choice's first text."""
        ...

    def text(
        self, index: int, text: str, usage: Usage | None, told: list[Told], offset: int
    ) -> str:
        """The event for new text and its tokens; `offset` is the length of an echo before it."""
        ...

    def echo(self, index: int, text: str, usage: Usage | None, told: list[Told]) -> str:
        """The event for a prompt that comes back."""
        ...

    def finish(self, index: int, reason: str, usage: Usage | None, stop: str | None = None) -> str:
        """The last event of a choice; `stop` is the stop string that ended it."""
        ...

    def usage(self, usage: Usage) -> str:
        """The event after all choices, if the client asked for it."""
        ...

    def piece(self, index: int, piece: Piece, usage: Usage | None, told: list[Told]) -> str:
        """The event for a part of an answer that is not just text."""
        ...

    def done(self, usage: Usage) -> bytes:
        """The very end of a stream."""
        ...

    def error(self, error: ApiError) -> bytes:
        """An error after the first byte, and the end."""
        ...

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        """The answer that is not streamed."""
        ...

    async def settled(self) -> None:
        """What it has written may leave; awaited each time before it does."""
        ...


class FormatMaker(Protocol):
    """Makes the format of one answer; usually the format's class."""

    @property
    def bytes_prefix(self) -> str:
        """Of the names of tokens that are a part of a character."""
        ...

    def __call__(
        self, id: str, model: str, created: int, details: TokenDetails, include_usage: bool
    ) -> AnswerFormat: ...


class _Format:
    """What both formats share: the head of every event, and usage at its end."""

    _prefix: str
    _kind: str
    _chunk_kind: str

    def __init__(
        self,
        id: str,
        model: str,
        created: int,
        details: TokenDetails,
        include_usage: bool = False,
    ) -> None:
        self.id = f"{self._prefix}-{id}"
        self._details = details
        self._num_calls: dict[int, int] = {}  # the place of each choice's last call
        self._common = {"created": created, "model": model}
        head = _dumps({"id": self.id, "object": self._chunk_kind, **self._common})[:-1]
        self._head = f'data: {head},"choices":['
        self._no_usage = ',"usage":null' if include_usage else ""

    def _event(self, choice: str, usage: Usage | None, more: str = "") -> str:
        tail = self._no_usage if usage is None else f',"usage":{_dumps(usage.as_dict())}'
        return f"{self._head}{choice}]{more}{tail}}}\n\n"

    def usage(self, usage: Usage) -> str:
        return self._event("", usage)

    def done(self, usage: Usage) -> bytes:
        return DONE

    async def settled(self) -> None:
        """Nothing is to be done before."""

    def error(self, error: ApiError) -> bytes:
        return error_event(error)

    def _logprobs(self, told: list[Told], offset: int) -> dict[str, Any] | None:
        raise NotImplementedError

    def _beside(self, told: list[Told], offset: int) -> tuple[str, str]:
        """(the `logprobs`, what is added to a choice) of an event with these tokens."""
        logprobs = self._logprobs(told, offset)
        text = "null" if logprobs is None else _dumps(logprobs)
        if not self._details.token_ids:
            return text, ""
        return text, f',"token_ids":{_dumps([item.token for item in told])}'

    def _end_of(self, result: ChoiceResult) -> dict[str, Any]:
        """The fields that both formats end a choice with."""
        end: dict[str, Any] = {
            "logprobs": self._logprobs(result.told, 0),
            "finish_reason": result.finish_reason,
        }
        if self._details.token_ids:
            end["token_ids"] = [told.token for told in result.told[result.num_echoed :]]
        return end

    def _of_prompt(self, result: ChoiceResult) -> dict[str, Any]:
        """What an answer says of a prompt."""
        said: dict[str, Any] = {}
        details = self._details
        if details.token_ids:
            said["prompt_token_ids"] = list(result.prompt_tokens)
        if details.prompt_logprobs is not None:
            said["prompt_logprobs"] = prompt_logprobs(
                result.prompt_tokens, result.prompt_rows, details.names, details.prompt_logprobs
            )
        return said

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
    bytes_prefix = "bytes:"

    def opening(self, index: int, prompt_tokens: Sequence[int]) -> str:
        if not self._details.token_ids:
            return ""
        ids = f',"prompt_token_ids":{_dumps(list(prompt_tokens))},"token_ids":[]'
        return self._event(self._choice(index, "", "null", "null", ids), None)

    def text(
        self, index: int, text: str, usage: Usage | None, told: list[Told], offset: int
    ) -> str:
        logprobs, ids = self._beside(told, offset) if told else ("null", "")
        return self._event(self._choice(index, text, logprobs, "null", ids), usage)

    def echo(self, index: int, text: str, usage: Usage | None, told: list[Told]) -> str:
        logprobs, _ = self._beside(told, 0)
        return self._event(self._choice(index, text, logprobs, "null", ""), usage)

    def finish(self, index: int, reason: str, usage: Usage | None, stop: str | None = None) -> str:
        return self._event(self._choice(index, "", "null", f'"{reason}"', ""), usage)

    def piece(self, index: int, piece: Piece, usage: Usage | None, told: list[Told]) -> str:
        raise AssertionError("a completion is just text")

    def _choice(self, index: int, text: str, logprobs: str, reason: str, more: str) -> str:
        return (
            f'{{"index":{index},"text":{quote(text)},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{more}}}'
        )

    def _logprobs(self, told: list[Told], offset: int) -> dict[str, Any] | None:
        details = self._details
        if details.logprobs is None:
            return None
        return completion_logprobs(told, details.names, details.logprobs, offset)

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": result.index,
                "text": result.text,
                **self._end_of(result),
                **self._of_prompt(result),
            }
            for result in results
        ]
        return self._object(choices, usage)


class ChatFormat(_Format):
    """/v1/chat/completions."""

    _prefix = "chatcmpl"
    _kind = "chat.completion"
    _chunk_kind = "chat.completion.chunk"
    bytes_prefix = ""

    def opening(self, index: int, prompt_tokens: Sequence[int]) -> str:
        choice = self._choice(index, '{"role":"assistant","content":""}', "null", "null", "")
        ids = f',"prompt_token_ids":{_dumps(list(prompt_tokens))}'
        return self._event(choice, None, ids if self._details.token_ids else "")

    def text(
        self, index: int, text: str, usage: Usage | None, told: list[Told], offset: int
    ) -> str:
        return self._delta(index, f'{{"content":{quote(text)}}}', usage, told)

    def piece(self, index: int, piece: Piece, usage: Usage | None, told: list[Told]) -> str:
        match piece:
            case Said(text):
                return self.text(index, text, usage, told, 0)
            case Thought(text):
                return self._delta(index, f'{{"reasoning_content":{quote(text)}}}', usage, told)
            case Called(name):
                place = self._num_calls[index] = self._num_calls.get(index, -1) + 1
                call = {"index": place, **tool_call(name, "")}
            case Arguments(text):
                call = {"index": self._num_calls[index], "function": {"arguments": text}}
        return self._delta(index, f'{{"tool_calls":[{_dumps(call)}]}}', usage, told)

    def _delta(self, index: int, delta: str, usage: Usage | None, told: list[Told]) -> str:
        logprobs, ids = self._beside(told, 0) if told else ("null", "")
        return self._event(self._choice(index, delta, logprobs, "null", ids), usage)

    def echo(self, index: int, text: str, usage: Usage | None, told: list[Told]) -> str:
        return self.text(index, text, usage, told, 0)

    def finish(self, index: int, reason: str, usage: Usage | None, stop: str | None = None) -> str:
        return self._event(self._choice(index, "{}", "null", f'"{reason}"', ""), usage)

    def _choice(self, index: int, delta: str, logprobs: str, reason: str, more: str) -> str:
        return (
            f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{more}}}'
        )

    def _logprobs(self, told: list[Told], offset: int) -> dict[str, Any] | None:
        details = self._details
        if details.logprobs is None:
            return None
        return chat_logprobs(told, details.names, details.logprobs)

    def whole(self, results: list[ChoiceResult], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": result.index,
                "message": _message(result),
                **self._end_of(result),
            }
            for result in results
        ]
        return {**self._object(choices, usage), **self._of_prompt(results[0])}


def _message(result: ChoiceResult) -> dict[str, Any]:
    """An assistant's turn; content is null where there are only calls."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
    if result.pieces is None:
        return message
    calls: list[dict[str, Any]] = []
    content, thoughts = "", ""
    for piece in result.pieces:
        match piece:
            case Said(text):
                content += text
            case Thought(text):
                thoughts += text
            case Called(name):
                calls.append(tool_call(name, ""))
            case Arguments(text):
                calls[-1]["function"]["arguments"] += text
    message["content"] = content or (None if calls else "")
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def tool_call(name: str, arguments: str) -> dict[str, Any]:
    """A call with an id of its own: nine characters, as Mistral's templates demand."""
    id = secrets.token_hex(5)[:9]
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def error_event(error: ApiError) -> bytes:
    """An error after the first byte: an event of its own, then the end of the stream."""
    return b"data: " + error.body_bytes() + b"\n\n" + DONE
