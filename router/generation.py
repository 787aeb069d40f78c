"""One client request: its prompts times n choices, and their way to the client.

`Streamed` writes events into a bounded buffer that the HTTP handler empties; `Collected` gathers
texts until all choices have ended. Choices after a prompt's first one start once the decode node
has spoken, so that they find the prompt in both nodes' prefix caches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from router.choice import Choice
from router.chunks import DONE, AnswerFormat, ChoiceResult, Usage, error_event
from router.errors import ApiError
from router.requests import Requests


class Generation:
    """What both ways have in common."""

    def __init__(self, requests: Requests, format: AnswerFormat) -> None:
        self._requests = requests
        self._format = format
        self._choices: list[Choice] = []
        self._num_ended = 0

    def start(self, choices: Sequence[Choice], n: int) -> None:
        """Submit `choices`: `n` of each prompt, one prompt after the other."""
        self._choices = list(choices)
        for first in range(0, len(choices), n):
            choices[first].followers = list(choices[first + 1 : first + n])
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

    def _count_end(self, choice: Choice) -> bool:
        """Whether `choice` was the last one."""
        if choice.text.finish is not None:
            self._num_ended += 1
        return self._num_ended == len(self._choices)


class Collected(Generation):
    """For an answer in one piece."""

    def __init__(
        self, requests: Requests, format: AnswerFormat, *, return_token_ids: bool = False
    ) -> None:
        super().__init__(requests, format)
        self._return_token_ids = return_token_ids
        self._texts: dict[int, list[str]] = {}
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def produced(self, choice: Choice, text: str) -> None:
        self._texts.setdefault(choice.index, []).append(text)
        if self._count_end(choice) and not self._done.done():
            self._done.set_result(None)

    def failed(self, error: ApiError) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self.cancel()

    async def answer(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        await self._done
        results = [self._result(choice) for choice in self._choices]
        return self._format.whole(results, self.usage())

    def _result(self, choice: Choice) -> ChoiceResult:
        assert choice.text.finish is not None
        text = "".join(self._texts[choice.index])
        token_ids = tuple(choice.dispatch.log.tokens) if self._return_token_ids else None
        return ChoiceResult(choice.index, text, choice.text.finish.value, token_ids)


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
        self._buffer = EventBuffer(max_buffered, on_overflow)
        self._opened: set[int] = set()

    def produced(self, choice: Choice, text: str) -> None:
        index, events = choice.index, []
        usage = self.usage() if self._continuous_usage else None
        if index not in self._opened:
            self._opened.add(index)
            events.append(self._format.opening(index))
        if text:
            events.append(self._format.text(index, text, usage))
        finish = choice.text.finish
        if finish is not None:
            events.append(self._format.finish(index, finish.value, usage))
        self._buffer.put("".join(events).encode())
        if self._count_end(choice):
            self._finish()

    def _finish(self) -> None:
        if self._include_usage:
            self._buffer.put(self._format.usage(self.usage()).encode())
        self._buffer.put(DONE)
        self._buffer.end(None)

    def failed(self, error: ApiError) -> None:
        self._buffer.end(error)
        self.cancel()

    async def next_events(self) -> bytes:
        """Events that are ready, at least one; empty after the last. ApiError before the first."""
        return await self._buffer.take()


class EventBuffer:
    """Bytes between the choices, which never wait, and one HTTP handler, which may."""

    def __init__(self, limit: int, on_overflow: Callable[[], None]) -> None:
        self._limit = limit
        self._on_overflow = on_overflow
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._began = False
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

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
            self._parts.append(error_event(error))
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
