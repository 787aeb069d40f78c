"""Requests as `/debug/requests` tells them in JSON. Seconds have six digits and add up exactly."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from router.request_log import RequestRecord
from router.trace import RUNNING, AttemptTrace, ChoiceTrace
from router.way import Verdict
from telemetry.timeline import Span


def summary(record: RequestRecord, now: float) -> dict[str, Any]:
    """One line of the list."""
    first = record.first
    return {
        "id": record.response_id,
        "model": record.model,
        "stream": record.stream,
        "state": "running" if record.running else "finished",
        "arrived_at": round(record.arrived_at, 3),
        "age_s": seconds(max(choice.timeline.at(now) for choice in record.choices)),
        "ttft_s": None if first is None else seconds(first.timeline.first_token),
        "open_phases": [_open_phase(choice, now) for choice in record.choices],
        "ends": [choice.end or None for choice in record.choices],
    }


def detail(record: RequestRecord, index: int | None, now: float) -> dict[str, Any]:
    """All that is known of it, or of one of its choices."""
    chosen = record.choices if index is None else [record.choices[index]]
    return {**summary(record, now), "choices": [_choice(choice, now) for choice in chosen]}


def _open_phase(choice: ChoiceTrace, now: float) -> str | None:
    return None if choice.end else choice.timeline.spans(now)[-1].phase.value


def _choice(choice: ChoiceTrace, now: float) -> dict[str, Any]:
    timeline = choice.timeline
    return {
        "index": choice.index,
        "request": choice.request,
        "end": choice.end or None,
        "prompt_tokens": choice.num_prompt_tokens,
        "output_tokens": choice.num_output_tokens,
        "refusals": choice.num_refusals,
        "ttft_s": seconds(timeline.first_token),
        "total_s": seconds(timeline.ended),
        "phases": [_phase(span) for span in timeline.spans(now)],
        "attempts": [_attempt(attempt) for attempt in choice.attempts],
    }


def _phase(span: Span) -> dict[str, Any]:
    return {
        "phase": span.phase.value,
        "start_s": seconds(span.start),
        "seconds": seconds(span.end - span.start),
    }


def _attempt(attempt: AttemptTrace) -> dict[str, Any]:
    return {
        "attempt": attempt.number,
        "prefill": str(attempt.prefill),
        "way": None if attempt.verdict is None else _way(attempt.verdict),
        "decode": None if attempt.decode is None else str(attempt.decode),
        "start_s": seconds(attempt.began),
        "end_s": seconds(attempt.ended),
        "cause": None if attempt.cause == RUNNING else attempt.cause,
        "cached_tokens": attempt.num_cached_tokens,
        "decode_messages": attempt.num_decode_messages,
        "prefill_timing": None if attempt.timing is None else asdict(attempt.timing),
        "transfer": None if attempt.transfer is None else asdict(attempt.transfer),
    }


def _way(verdict: Verdict) -> dict[str, Any]:
    """What was chosen, and why; predicted are times to the first token, and from it to the next."""
    return {
        "chosen": "handoff" if verdict.hand_over else "in_place",
        "reason": verdict.reason.value,
        "handoff_s": verdict.over_s,
        "in_place_s": verdict.in_place_s,
    }


def seconds(micros: int | None) -> float | None:
    return None if micros is None else micros / 1e6
