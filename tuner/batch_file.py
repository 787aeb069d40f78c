"""The files of a batch, in OpenAI's format: requests in, results out, one JSON object per line.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {…}}
    out   {"id": …, "custom_id": "a", "response": {"status_code": 200, …}, "error": null}

The output is also the record of what is done. A result is appended with one write, so what a killed
run leaves is whole lines and at most one torn line at the end, which the next run cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wire.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_LINE_BYTES = 64 << 20
_MAX_ID_CHARS = 512
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One good line."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that cannot be sent, and why; its number counts from 1."""

    line: int
    code: str
    message: str
    custom_id: str | None = None


def read_requests(path: Path) -> Iterator[BatchRequest | BadLine]:
    """Every line that is not empty, in order. Raises ConfigError if the file cannot be opened."""
    lines: dict[str, int] = {}  # custom id → the line that had it first
    with _open(path) as file:
        for number, data in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if not data.strip():
                continue
            request = parse_request(number, data, whole=_skip_rest(file, data))
            if isinstance(request, BatchRequest):
                first = lines.setdefault(request.custom_id, number)
                if first != number:
                    message = (
                        f"line {number}: custom_id {request.custom_id!r} stands in line {first}"
                    )
                    request = BadLine(number, "duplicate_custom_id", message, request.custom_id)
            yield request


def count_lines(path: Path) -> int:
    """Lines that are not empty. Raises ConfigError as above, or if there is none."""
    with _open(path) as file:
        count = sum(1 for line in file if line.strip())
    if not count:
        raise ConfigError(f"{path} has no requests")
    return count


def _skip_rest(file: IO[bytes], data: bytes) -> bool:
    """Whether `data` is a whole line; else go to the next one."""
    whole = len(data) < MAX_LINE_BYTES or data.endswith(b"\n")
    while len(data) == MAX_LINE_BYTES and not data.endswith(b"\n"):
        data = file.readline(MAX_LINE_BYTES)
    return whole


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def parse_request(line: int, data: bytes, *, whole: bool = True) -> BatchRequest | BadLine:
    """One line of the input."""
    if not whole:
        text = f"line {line}: longer than {MAX_LINE_BYTES} bytes"
        return BadLine(line, "invalid_json_line", text)
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return BadLine(line, "invalid_json_line", f"line {line}: not valid JSON")
    if not isinstance(fields, dict):
        return BadLine(line, "invalid_json_line", f"line {line}: not a JSON object")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_CHARS:
        message = f"line {line}: custom_id must be a string of 1 to {_MAX_ID_CHARS} characters"
        return BadLine(line, "missing_required_parameter", message)
    code, mistake = _mistake(fields)
    if mistake:
        return BadLine(line, code, f"line {line}: {mistake}", custom_id)
    return BatchRequest(line, custom_id, fields["url"], fields["body"])


def _mistake(fields: dict[str, Any]) -> tuple[str, str]:
    """A code and what is wrong with a line that has its custom id; empty if nothing is."""
    if fields.get("method") != "POST":
        return "invalid_method", 'method must be "POST"'
    if fields.get("url") not in URLS:
        return "invalid_url", f"url must be one of {', '.join(URLS)}"
    body = fields.get("body")
    if not isinstance(body, dict):
        return "missing_required_parameter", "body must be a JSON object"
    if body.get("stream"):
        return "invalid_request", "a batch does not stream: leave out `stream`"
    unknown = fields.keys() - {"custom_id", "method", "url", "body"}
    if unknown:
        return "unknown_parameter", f"{min(unknown)!r} is no field of a batch line"
    return "", ""


# ---------------------------------------------------------------- results


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one line: an answer, or an error where there was none."""

    custom_id: str | None
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def ok(self) -> bool:
        return self.response is not None and self.response["status_code"] == 200

    @property
    def worth_another_try(self) -> bool:
        """Whether another day may bring another answer."""
        if self.response is None:
            return self.error is not None and "line" not in self.error
        return self.response["status_code"] in (408, 429) or self.response["status_code"] >= 500

    def to_line(self) -> bytes:
        fields = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": self.custom_id,
            "response": self.response,
            "error": self.error,
        }
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def bad_line_result(bad: BadLine) -> Result:
    """The error of a line that was not sent. It has the line's number, which tells it again."""
    error = {"code": bad.code, "message": bad.message, "line": bad.line}
    return Result(bad.custom_id, error=error)


class Done:
    """What earlier runs have finished."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._bad_lines: set[int] = set()
        self.num_failed = 0

    def __len__(self) -> int:
        return len(self._ids) + len(self._bad_lines)

    def __contains__(self, request: BatchRequest | BadLine) -> bool:
        if isinstance(request, BadLine):
            return request.line in self._bad_lines
        return request.custom_id in self._ids

    def add(self, result: Result) -> None:
        """A bad line says nothing of its custom id, which another line may have rightly."""
        self.num_failed += not result.ok
        if result.error is not None and "line" in result.error:
            self._bad_lines.add(result.error["line"])
        elif result.custom_id is not None:
            self._ids.add(result.custom_id)


class ResultFile:
    """A file that results are appended to; only one process at a time has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ConfigError(f"{path} is in use by another run-batch") from error

    def recover(self, done: Done, *, drop_failed: bool) -> None:
        """Cut off a torn last line, and enter all others into `done`.

        Args:
            drop_failed: take out the results that another try may better.
        Raises:
            ConfigError: there are lines that are no results; nothing is changed then.
        """
        whole, dropped, start = 0, [], 0
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                whole = start + len(line)
                result = self._parse(number, line)
                if drop_failed and result.worth_another_try:
                    dropped.append((start, whole))
                else:
                    done.add(result)
                start = whole
        os.ftruncate(self._file, whole)
        if dropped:
            self._take_out(dropped, whole)

    def _parse(self, number: int, line: bytes) -> Result:
        try:
            fields = json.loads(line)
            result = Result(fields["custom_id"], fields["response"], fields["error"])
            if result.response is not None:
                int(result.response["status_code"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{self._path}: line {number} is no result of a batch; give another file with -o"
            ) from error
        return result

    def _take_out(self, dropped: list[tuple[int, int]], end: int) -> None:
        """Write the file anew without these ranges; it is replaced at once or not at all."""
        copy = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        borders = [0, *(offset for span in dropped for offset in span), end]
        with copy.open("wb") as file:
            for start, stop in zip(borders[::2], borders[1::2], strict=True):
                for offset in range(start, stop, _COPY_BYTES):
                    file.write(os.pread(self._file, min(_COPY_BYTES, stop - offset), offset))
        fresh = os.open(copy, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        fcntl.flock(fresh, fcntl.LOCK_EX)
        copy.replace(self._path)
        os.close(self._file)
        self._file = fresh

    def append(self, result: Result) -> None:
        """Raises ConfigError where the disk does not take it."""
        line = memoryview(result.to_line())
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._file)
