"""Sends a batch to an endpoint: so many requests at a time, each until it has its answer.

    input lines ─▶ already done? ─▶ POST, again while the server is too busy ─▶ result file

A line's result is in a file before its place is given to another one, so that whatever ends the
run, the next one goes on behind it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from telemetry.progress import ProgressLine
from tuner.batch_file import (
    BadLine,
    BatchRequest,
    Done,
    Result,
    ResultFile,
    bad_line_result,
    count_lines,
    read_requests,
)
from tuner.client import Target, make_session, reason
from wire.errors import ConfigError

MAX_ANSWER_BYTES = 256 << 20
_BUSY = (429, 503)
_MAX_WAIT_S = 60.0
_MAX_RETRY_AFTER_S = 600.0


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """One run of a batch, decided."""

    input: Path
    output: Path
    errors: Path | None  # None: failures stand in the output too
    target: Target
    concurrency: int = 32
    max_retries: int = 10
    retry_failed: bool = False


@dataclass(slots=True)
class Tally:
    """How far it is; lines of earlier runs included."""

    total: int
    done: int = 0
    failed: int = 0
    first_failure: str = ""

    def count(self, result: Result) -> None:
        self.done += 1
        if not result.ok:
            self.failed += 1
            self.first_failure = self.first_failure or _describe(result)


def _describe(result: Result) -> str:
    if result.error is not None:
        return str(result.error["message"])
    assert result.response is not None
    body = result.response["body"]
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return f"{result.custom_id}: {message or result.response['status_code']}"


class BatchFiles:
    """Where results go, and what of the input is still to be done."""

    def __init__(self, settings: BatchSettings) -> None:
        paths = {settings.output, settings.errors or settings.output}
        if settings.input.resolve() in {path.resolve() for path in paths}:
            raise ConfigError(f"{settings.input} is the input; give another file with -o")
        self._input = settings.input
        self.tally = Tally(count_lines(settings.input))
        self._done = Done()
        self._output = ResultFile(settings.output)
        self._errors = self._output
        try:
            if settings.errors is not None and settings.errors != settings.output:
                self._errors = ResultFile(settings.errors)
            for file in {self._output, self._errors}:
                file.recover(self._done, drop_failed=settings.retry_failed)
        except BaseException:
            self.close()
            raise
        self.num_known = self.tally.done = len(self._done)
        self.tally.failed = self._done.num_failed

    def to_do(self) -> Iterator[BatchRequest]:
        """What is to be sent; bad lines get their result on the way."""
        for request in read_requests(self._input):
            if request in self._done:
                continue
            if isinstance(request, BadLine):
                self.finish(bad_line_result(request))
            else:
                yield request

    def finish(self, result: Result) -> None:
        (self._output if result.ok else self._errors).append(result)
        self.tally.count(result)

    def close(self) -> None:
        for file in {self._output, self._errors}:
            file.close()


async def run_batch(settings: BatchSettings, files: BatchFiles) -> None:
    """Send what is left to do.

    Raises:
        ConfigError: the server cannot be reached, or a file not be read or written; what was
            answered until then is in the files.
    """
    requests, tally = files.to_do(), files.tally
    with ProgressLine("run-batch") as progress:
        async with make_session(settings.target) as session:
            sender = _Sender(session, settings)

            async def work() -> None:
                for request in requests:  # the workers share one iterator
                    files.finish(await sender.answer(request))
                    note = f"{tally.done}/{tally.total}, {tally.failed} failed"
                    progress.update("requests", tally.done, tally.total, note)

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(settings.concurrency):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise _first(group) from None


def _first(group: ExceptionGroup[Exception]) -> Exception:
    """What ended the run; the others are its consequences."""
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


class _Sender:
    """Asks until there is an answer that is worth keeping."""

    def __init__(self, session: aiohttp.ClientSession, settings: BatchSettings) -> None:
        self._session = session
        self._url = settings.target.url
        self._timeout_s = settings.target.timeout_s
        self._max_retries = settings.max_retries

    async def answer(self, request: BatchRequest) -> Result:
        """Raises ConfigError if nobody is there."""
        for tried in range(self._max_retries + 1):
            last = tried == self._max_retries
            try:
                result, wait_s = await self._ask(request)
            except aiohttp.ClientConnectorError as error:
                if last:
                    text = f"cannot reach {self._url}: {reason(error)}; run it again to go on"
                    raise ConfigError(text) from error
                wait_s = None
            else:
                if last or not _again(result):
                    return result
            await asyncio.sleep(backoff_s(tried) if wait_s is None else wait_s)
        raise AssertionError("the last try has returned or raised")

    async def _ask(self, request: BatchRequest) -> tuple[Result, float | None]:
        """A result, and how long the server wants to be left alone."""
        try:
            async with self._session.post(self._url + request.url, json=request.body) as response:
                body = await _json_body(response)
                answer = {
                    "status_code": response.status,
                    "request_id": response.headers.get("x-request-id", ""),
                    "body": body,
                }
                return Result(request.custom_id, answer), _retry_after_s(response)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise ConfigError(f"not a URL: {self._url}") from error
        except TimeoutError:
            text = f"no complete answer within {self._timeout_s:g} s"
            return _no_answer(request, "request_timeout", text), None
        except ValueError as error:
            return _no_answer(request, "invalid_answer", str(error)), None
        except (aiohttp.ClientError, OSError) as error:
            return _no_answer(request, "connection_lost", reason(error)), None


def _again(result: Result) -> bool:
    """Whether the server was only too busy, or gone in the middle."""
    if result.response is None:
        assert result.error is not None
        return bool(result.error["code"] == "connection_lost")
    return result.response["status_code"] in _BUSY


def _no_answer(request: BatchRequest, code: str, message: str) -> Result:
    return Result(request.custom_id, error={"code": code, "message": message})


async def _json_body(response: aiohttp.ClientResponse) -> Any:
    """Raises ValueError where it is no JSON or too much."""
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            raise ValueError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer with status {response.status} is no JSON") from error


def _retry_after_s(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        return None
    return min(float(text), _MAX_RETRY_AFTER_S)


def backoff_s(tried: int, draw: Callable[[], float] = random.random) -> float:
    """Half a second, then twice as long each time up to a minute; a random half of it is left out,
    so that those who were refused together do not come back together."""
    return min(_MAX_WAIT_S, 0.5 * 2.0 ** min(tried, 16)) * (0.5 + 0.5 * draw())
