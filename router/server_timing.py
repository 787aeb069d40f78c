"""The `Server-Timing` header: where a response's time went, in milliseconds.

    Server-Timing: read;dur=0.112, tokenize;dur=0.871, …, network;dur=0.4, ttft;dur=40.2

The entries before `ttft` add up to it, exactly. After it come those that are over when the header
leaves: `handoff` and `decode` of an answer in one piece, perhaps `handoff` of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.request_log import RequestRecord
from router.trace import ChoiceTrace
from telemetry.timeline import Span


def timing_headers(record: RequestRecord) -> dict[str, str]:
    """Of the choice whose first token came first; none before that."""
    timing = None if record.first is None else server_timing(record.first)
    return {} if timing is None else {"Server-Timing": timing}


def server_timing(trace: ChoiceTrace) -> str | None:
    """The header's value; None before the first token."""
    timeline = trace.timeline
    if timeline.first_token is None:
        return None
    before = timeline.spans_to_first_token()
    after = timeline.spans()[len(before) :]
    entries = [*_summed(before), ("ttft", timeline.first_token), *_summed(after)]
    return ", ".join(f"{name};dur={micros / 1000:.3f}" for name, micros in entries)


def _summed(spans: Iterable[Span]) -> list[tuple[str, int]]:
    """One entry per phase, in order of appearance: a retried request has some twice."""
    totals: dict[str, int] = {}
    for span in spans:
        totals[span.phase.value] = totals.get(span.phase.value, 0) + span.end - span.start
    return list(totals.items())
