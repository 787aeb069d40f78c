"""One client request: its prompts times n choices, and their way to the client.

`Streamed` writes events into a bounded buffer that the HTTP handler empties; `Collected` gathers
texts until all choices have ended. Choices after a prompt's first one start once the decode node
has spoken, so that they find the prompt in both nodes' prefix caches.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from router.choice import Choice
from router.choice_text import Told
from router.chunks import AnswerFormat, ChoiceResult, Usage
from router.errors import ApiError
from router.logprobs import cumulative
from router.prompts import INLINE_TOKENS
from router.requests import Requests
from router.tools.pieces import Piece, merged


class Generation:
    """What both ways have in common."""

    def __init__(self, requests: Requests, format: AnswerFormat) -> None:
        self._requests = requests
        self._format = format
        self._choices: list[Choice] = []
        self._per_prompt = 1
        self._num_ended = 0

    def start(self, choices: Sequence[Choice], n: int) -> None:
        """Submit `choices`: `n` of each prompt, one prompt after the other."""
        self._choices, self._per_prompt = list(choices), n
        for first in range(0, len(choices), n):
            others = list(choices[first + 1 : first + n])
            if choices[first].work.sampling.beam is None:
                choices[first].followers = others
            else:
                choices[first].beams = others
        for first in range(0, len(choices), n):
            self._requests.submit(choices[first])

    def cancel(self) -> None:
        """The client has gone, or one choice has failed: end the others."""
        for choice in self._choices:
            choice.followers = []
        for choice in self._choices:
            self._requests.cancel(choice)

    def usage(self) -> Usage:
        """Counts so far; a prompt counts once, however many choices it has."""
        prompts = {id(choice.work.prompt): choice for choice in reversed(self._choices)}
        return Usage(
            num_prompt_tokens=sum(choice.work.num_tokens for choice in prompts.values()),
            num_output_tokens=sum(choice.text.num_tokens for choice in self._choices),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in prompts.values()),
        )

    def _prompt_rows(self, choice: Choice) -> tuple[bytes, ...]:
        """The prompt's logprobs, which only its first choice asks for."""
        first = self._choices[choice.index - choice.index % self._per_prompt]
        return first.dispatch.log.prompt_rows

    def _count_end(self, choice: Choice) -> bool:
        """Whether `choice` was the last one."""
        if choice.text.finish is not None:
            self._num_ended += 1
        return self._num_ended == len(self._choices)


class Collected(Generation):
    """For an answer in one piece.

    Args:
        num_best: of each prompt's choices so many are answered, those with the highest cumulative
            logprob first; None answers all.
    """

    def __init__(
        self, requests: Requests, format: AnswerFormat, *, num_best: int | None = None
    ) -> None:
        super().__init__(requests, format)
        self._num_best = num_best
        self._texts: dict[int, list[str]] = {}
        self._pieces: dict[int, list[Piece]] = {}
        self._told: dict[int, list[Told]] = {}
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def produced(self, choice: Choice, text: str) -> None:
        self._texts.setdefault(choice.index, []).append(text)
        if choice.parser is not None:
            self._pieces.setdefault(choice.index, []).extend(choice.read(text))
        self._told.setdefault(choice.index, []).extend(choice.text.take_told())
        if self._count_end(choice) and not self._done.done():
            self._done.set_result(None)

    def failed(self, error: ApiError) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self.cancel()

    async def answer(self) -> bytes:
        """The whole answer, as JSON. Raises ApiError."""
        await self._done
        results = [self._result(choice) for choice in self._best()]
        results = [replace(result, index=index) for index, result in enumerate(results)]
        if sum(result.num_details for result in results) <= INLINE_TOKENS:
            return self._write(results)
        return await asyncio.to_thread(self._write, results)

    def _write(self, results: list[ChoiceResult]) -> bytes:
        return json.dumps(self._format.whole(results, self.usage())).encode()

    def _best(self) -> list[Choice]:
        """Those that are answered, prompt by prompt."""
        if self._num_best is None:
            return self._choices
        best: list[Choice] = []
        for first in range(0, len(self._choices), self._per_prompt):
            of_prompt = self._choices[first : first + self._per_prompt]
            of_prompt.sort(key=lambda choice: cumulative(self._told[choice.index]), reverse=True)
            best += of_prompt[: self._num_best]
        return best

    def _result(self, choice: Choice) -> ChoiceResult:
        assert choice.text.finish is not None
        text, told = "".join(self._texts[choice.index]), self._told[choice.index]
        rows = self._prompt_rows(choice)
        echoed: list[Told] = []
        if choice.echo is not None:
            echoed, shift = choice.echo.told(rows), len(choice.echo.text)
            text = choice.echo.text + text
            told = [replace(item, offset=item.offset + shift) for item in told]
        return ChoiceResult(
            index=choice.index,
            text=text,
            finish_reason=choice.finish_reason,
            stop=choice.text.stop,
            pieces=None if choice.parser is None else merged(self._pieces[choice.index]),
            told=echoed + told,
            num_echoed=len(echoed),
            prompt_tokens=choice.work.prompt.tokens,
            prompt_rows=rows,
        )


class Streamed(Generation):
    """For an event stream.

    Args:
        max_buffered: bytes that may wait for the client.
        on_overflow: called once when more would wait: the client does not read.
    """

    def __init__(
        self,
        requests: Requests,
        format: AnswerFormat,
        *,
        include_usage: bool,
        continuous_usage: bool,
        max_buffered: int,
        on_overflow: Callable[[], None],
    ) -> None:
        super().__init__(requests, format)
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._buffer = EventBuffer(max_buffered, on_overflow, format.error)
        self._opened: set[int] = set()

    def produced(self, choice: Choice, text: str) -> None:
        index, events = choice.index, []
        usage = self.usage() if self._continuous_usage else None
        if index not in self._opened:
            self._opened.add(index)
            events += self._open(choice, usage)
        told = choice.text.take_told()
        if choice.parser is not None:
            events += self._read(choice, text, usage, told)
        elif text or told:
            offset = 0 if choice.echo is None else len(choice.echo.text)
            events.append(self._format.text(index, text, usage, told, offset))
        if choice.text.finish is not None:
            stop = choice.text.stop
            events.append(self._format.finish(index, choice.finish_reason, usage, stop))
        self._buffer.put("".join(events).encode())
        if self._count_end(choice):
            self._finish()

    def _read(self, choice: Choice, text: str, usage: Usage | None, told: list[Told]) -> list[str]:
        """The events for what new text says; its tokens go with the first."""
        events = []
        for piece in choice.read(text):
            events.append(self._format.piece(choice.index, piece, usage, told))
            told = []
        if told:
            events.append(self._format.text(choice.index, "", usage, told, 0))
        return events

    def _open(self, choice: Choice, usage: Usage | None) -> list[str]:
        """What precedes a choice's own text: its role, or the prompt."""
        events = [self._format.opening(choice.index, choice.work.prompt.tokens)]
        if choice.echo is not None:
            told = choice.echo.told(self._prompt_rows(choice))
            events.append(self._format.echo(choice.index, choice.echo.text, usage, told))
        return events

    def _finish(self) -> None:
        if self._include_usage:
            self._buffer.put(self._format.usage(self.usage()).encode())
        self._buffer.put(self._format.done(self.usage()))
        self._buffer.end(None)

    def failed(self, error: ApiError) -> None:
        self._buffer.end(error)
        self.cancel()

    def status_sent(self) -> None:
        """From now on an error is an event, even before the first token."""
        self._buffer.begin()

    async def next_events(self) -> bytes:
        """Events that are ready, at least one; empty after the last. ApiError before the first."""
        return await self._buffer.take()


class EventBuffer:
    """Bytes between the choices, which never wait, and one HTTP handler, which may."""

    def __init__(
        self,
        limit: int,
        on_overflow: Callable[[], None],
        error_event: Callable[[ApiError], bytes],
    ) -> None:
        self._error_event = error_event
        self._limit = limit
        self._on_overflow = on_overflow
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._began = False
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def begin(self) -> None:
        """The status has left: nothing can be raised any more."""
        self._began = True
        if self._error is not None:
            self._parts.append(self._error_event(self._error))
            self._error = None

    def put(self, data: bytes) -> None:
        if self._ended or not data:
            return
        self._began = True
        self._parts.append(data)
        self._size += len(data)
        if self._size > self._limit:
            self._parts.clear()
            self._ended = True
            self._on_overflow()
        self._wake()

    def end(self, error: ApiError | None) -> None:
        """Nothing follows. An error after the first byte becomes an event."""
        if self._ended:
            return
        if error is not None and self._began:
            self._parts.append(self._error_event(error))
            error = None
        self._ended, self._error = True, error
        self._wake()

    async def take(self) -> bytes:
        if not self._parts and not self._ended:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._error is not None:
            raise self._error
        data = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return data

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
