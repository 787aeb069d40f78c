"""Recorded load: when requests came, how long they were, and which prefixes they shared.

A request's prompt is a row of blocks; `block_ids[i]` names what block i holds *and everything
before it*, so requests whose first n ids agree have the first n blocks in common. The last block
may be partly filled. Tokens beyond the named blocks are the request's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request as it was recorded."""

    at: float  # seconds from the trace's start
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()
    text: str | None = None  # of a prompt file; `input_len` then counts words


@dataclass(frozen=True, slots=True)
class SkippedLine:
    """A line that could not be read, and why."""

    number: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.number}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of time."""

    name: str
    requests: tuple[TracedRequest, ...]
    block_len: int = 0  # tokens per named block; 0: no prefixes are known
    timed: bool = True  # False: `at` says nothing but the order
    num_skipped: int = 0
    skipped: tuple[SkippedLine, ...] = ()  # the first few of them

    @property
    def duration_s(self) -> float:
        return self.requests[-1].at if self.requests else 0.0

    @property
    def rate(self) -> float:
        """Mean requests per second; 0 where all came at once."""
        return (len(self.requests) - 1) / self.duration_s if self.duration_s else 0.0

    def skipped_text(self) -> str:
        """One line for the user; empty if every line was read."""
        if not self.num_skipped:
            return ""
        shown = "; ".join(str(line) for line in self.skipped[:3])
        more = ", …" if self.num_skipped > 3 else ""
        return f"{self.name}: {self.num_skipped} lines skipped ({shown}{more})"


def first_requests(trace: Trace, number: int) -> Trace:
    """Only the first `number` requests."""
    return replace(trace, requests=trace.requests[:number])


def repeated(trace: Trace, number: int) -> Trace:
    """So many requests: the trace again and again, each time with prefixes of its own."""
    if not trace.rate:  # one moment or none: nobody knows when it would begin anew
        return first_requests(trace, number)
    period = trace.duration_s + 1 / trace.rate
    names = 1 + max((id for request in trace.requests for id in request.block_ids), default=0)
    rows = []
    for index in range(number):
        turn, place = divmod(index, len(trace.requests))
        one = trace.requests[place]
        ids = tuple(id + turn * names for id in one.block_ids)
        rows.append(replace(one, at=one.at + turn * period, block_ids=ids))
    return replace(trace, requests=tuple(rows))


def scale_rate(trace: Trace, factor: float) -> Trace:
    """The same requests, `factor` times as many per second."""
    requests = tuple(replace(request, at=request.at / factor) for request in trace.requests)
    return replace(trace, requests=requests)


def scale_lengths(trace: Trace, factor: float) -> Trace:
    """Prompts and outputs `factor` times as long, at least one token; text stays as it is.

    Shared prefixes stay shared: where blocks are named, their length is scaled to a whole number
    of tokens and the prompts by the same ratio, so that every prompt keeps its number of blocks.
    """
    block_len = max(1, round(trace.block_len * factor)) if trace.block_len else 0
    ratio = block_len / trace.block_len if trace.block_len else factor

    def scaled(request: TracedRequest) -> TracedRequest:
        output_len = max(1, round(request.output_len * factor)) if request.output_len else 0
        if request.text is not None:
            return replace(request, output_len=output_len)
        input_len = ceil(request.input_len * ratio - 1e-9)
        return replace(request, input_len=max(1, input_len), output_len=output_len)

    return replace(trace, requests=tuple(map(scaled, trace.requests)), block_len=block_len)


def limit_lengths(trace: Trace, max_total: int) -> tuple[Trace, int]:
    """Without the requests that a model of `max_total` tokens cannot hold; how many those were."""
    fitting = tuple(r for r in trace.requests if r.input_len + r.output_len <= max_total)
    return replace(trace, requests=fitting), len(trace.requests) - len(fitting)
