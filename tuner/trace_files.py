"""Reads recorded load: Mooncake's JSONL, Azure's and BurstGPT's CSV, and plain prompt files.

A line that cannot be read is counted and told with its number; the rest is used. Only a file of
which nothing can be read is an error.

    mooncake   {"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [id, …]}
    azure      TIMESTAMP,ContextTokens,GeneratedTokens
    burstgpt   Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
    prompts    {"prompt": text, "output_tokens": n} (the number may be missing), or text lines
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import Any

from tuner.trace import SkippedLine, Trace, TracedRequest
from wire.errors import ConfigError

MOONCAKE_BLOCK = 512
MAX_SKIPPED_SHOWN = 20
MAX_LEN = 1 << 24
UNREADABLE = (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error)

Line = tuple[int, str]
Parse = Callable[[str], TracedRequest]


class TraceFormat(StrEnum):
    """What the lines of a file are."""

    MOONCAKE = "mooncake"
    AZURE = "azure"
    BURSTGPT = "burstgpt"
    PROMPTS = "prompts"


def read_trace(path: Path, form: TraceFormat | None = None) -> Trace:
    """Read a file; its format is told by its first line where it is not given.

    Raises:
        ConfigError: it cannot be opened, its format is unknown, or no line of it can be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    # Not splitlines(): text in JSON may hold what Unicode, but not JSON, takes for a line's end.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ConfigError(f"{path} is empty")
    form = form or detect(path.name, lines[0][1])
    trace = _collect(path.name, form, lines)
    if not trace.requests:
        first = trace.skipped[0] if trace.skipped else "there are no lines"
        raise ConfigError(f"{path}: no line can be read as {form.value} ({first})")
    return trace


def detect(name: str, first_line: str) -> TraceFormat:
    """The format that a file's first line shows; a file of plain text is one of prompts."""
    header = [field.strip().lower() for field in first_line.split(",")]
    if "contexttokens" in header and "generatedtokens" in header:
        return TraceFormat.AZURE
    if "request tokens" in header and "response tokens" in header:
        return TraceFormat.BURSTGPT
    if name.endswith(".csv"):
        raise ConfigError(f"{name}: these columns are neither Azure's nor BurstGPT's")
    if '"input_length"' in first_line or '"hash_ids"' in first_line:
        return TraceFormat.MOONCAKE
    return TraceFormat.PROMPTS


def _collect(name: str, form: TraceFormat, lines: list[Line]) -> Trace:
    requests: list[TracedRequest] = []
    skipped: list[SkippedLine] = []
    num_skipped = 0
    parse, rest = _parser(name, form, lines)
    for number, line in rest:
        try:
            requests.append(parse(line))
        except UNREADABLE as error:
            num_skipped += 1
            if len(skipped) < MAX_SKIPPED_SHOWN:
                skipped.append(SkippedLine(number, _reason(error)))
    timed = form is not TraceFormat.PROMPTS
    if not timed:
        requests = [replace(request, at=float(index)) for index, request in enumerate(requests)]
    block_len = MOONCAKE_BLOCK if form is TraceFormat.MOONCAKE else 0
    return Trace(name, _from_zero(requests), block_len, timed, num_skipped, tuple(skipped))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:120]


def _from_zero(requests: Iterable[TracedRequest]) -> tuple[TracedRequest, ...]:
    ordered = sorted(requests, key=lambda request: request.at)
    return tuple(replace(request, at=request.at - ordered[0].at) for request in ordered)


def _parser(name: str, form: TraceFormat, lines: list[Line]) -> tuple[Parse, Iterator[Line]]:
    """What reads a line, and the lines that hold requests."""
    rest = iter(lines)
    if form is TraceFormat.MOONCAKE:
        return _mooncake, rest
    if form is TraceFormat.PROMPTS:
        return (_json_prompt if lines[0][1].lstrip().startswith("{") else _text_prompt), rest
    header = [field.strip().lower() for field in next(csv.reader([next(rest)[1]]))]
    read = _azure if form is TraceFormat.AZURE else _burstgpt

    def parse(line: str) -> TracedRequest:
        row = next(csv.reader([line]))
        if len(row) != len(header):
            raise ValueError(f"{len(row)} columns, not {len(header)}")
        return read(dict(zip(header, row, strict=True)))

    return parse, rest


def _mooncake(line: str) -> TracedRequest:
    entry = _object(line)
    ids = entry.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise ValueError("hash_ids is not a list of whole numbers")
    input_len = _length(entry["input_length"])
    if len(ids) > -(-input_len // MOONCAKE_BLOCK):
        raise ValueError(f"{len(ids)} hash_ids are too many for {input_len} tokens")
    at = _seconds(entry["timestamp"]) / 1e3
    return TracedRequest(at, input_len, _length(entry["output_length"]), tuple(ids))


def _azure(row: dict[str, str]) -> TracedRequest:
    at = datetime.fromisoformat(row["timestamp"].strip())
    at = at.replace(tzinfo=at.tzinfo or UTC)
    input_len, output_len = _length(row["contexttokens"]), _length(row["generatedtokens"])
    return TracedRequest(at.timestamp(), input_len, output_len)


def _burstgpt(row: dict[str, str]) -> TracedRequest:
    input_len, output_len = _length(row["request tokens"]), _length(row["response tokens"])
    at = row["timestamp"] if "timestamp" in row else row["timestamp(s)"]
    return TracedRequest(_seconds(at), input_len, output_len)


def _json_prompt(line: str) -> TracedRequest:
    entry = _object(line)
    if not isinstance(entry["prompt"], str):
        raise ValueError("prompt is not text")
    output_len = entry.get("output_tokens")
    return replace(
        _text_prompt(entry["prompt"]), output_len=0 if output_len is None else _length(output_len)
    )


def _text_prompt(line: str) -> TracedRequest:
    """How much to generate is for the flags to say."""
    words = line.split()
    if not words:
        raise ValueError("the prompt is empty")
    return TracedRequest(0.0, len(words), 0, text=line.strip())


def _object(line: str) -> dict[str, Any]:
    entry = json.loads(line)
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    return entry


def _length(value: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError(f"{value!r} is not a number of tokens")
    length = int(value)
    if not 1 <= length <= MAX_LEN:
        raise ValueError(f"{length} is not a number of tokens")
    return length


def _seconds(value: Any) -> float:
    at = float(value)
    if not isfinite(at):
        raise ValueError(f"{value!r} is not a time")
    return at
