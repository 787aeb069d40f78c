"""A request's waterfall as text, for a person in a terminal.

queue              0.9 ms     0.3 ms   ▏█                                    │
prefill            1.4 ms    38.1 ms   ▏ █████████████████                   │
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from router.request_log import RequestRecord
from router.trace import AttemptTrace, ChoiceTrace
from router.way import Verdict
from telemetry.timeline import MEANING, Span

WIDTH = 48  # characters of the picture
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def listing(summaries: Iterable[dict[str, Any]]) -> str:
    """One line per request, of those that `router.request_json.summary` makes."""
    lines = [f"{'id':<42} {'state':<10} {'age':>9} {'ttft':>9}  phase or end"]
    for told in summaries:
        ttft, age = ("-" if s is None else _duration_s(s) for s in (told["ttft_s"], told["age_s"]))
        phases = [
            end or phase for end, phase in zip(told["ends"], told["open_phases"], strict=True)
        ]
        where = ", ".join(dict.fromkeys(phases))  # each different word once
        lines.append(f"{told['id']:<42} {told['state']:<10} {age:>9} {ttft:>9}  {where}")
    return "\n".join(lines) + "\n"


def _duration_s(seconds: float) -> str:
    return duration(round(seconds * 1e6))


def waterfall(record: RequestRecord, index: int | None, now: float) -> str:
    """The request's choices, or one of them, each with its picture."""
    arrived = datetime.fromtimestamp(record.arrived_at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    kind = "stream" if record.stream else "one answer"
    lines = [f"{record.response_id}   {record.model}   {kind}   arrived {arrived} UTC"]
    chosen = record.choices if index is None else [record.choices[index]]
    for choice in chosen:
        lines += ["", *_choice(choice, now)]
    return "\n".join(lines) + "\n"


def _choice(choice: ChoiceTrace, now: float) -> list[str]:
    timeline = choice.timeline
    spans, before = timeline.spans(now), timeline.spans_to_first_token()
    after = spans[len(before) :]
    lines = [
        f"choice {choice.index}: {choice.num_prompt_tokens} prompt tokens, "
        f"{choice.num_output_tokens} output tokens, {choice.end or 'running'}",
        "",
        *_picture("to the first token", before),
        *_picture("after it" if before else "without a first token so far", after),
        *(line for attempt in choice.attempts for line in _attempt(attempt)),
    ]
    if choice.num_refusals:
        lines.append(f"  no decode node had room {choice.num_refusals} times")
    legend = dict.fromkeys(span.phase for span in spans)
    return [*lines, "", *(f"  {phase:<14} {MEANING[phase]}" for phase in legend)]


def _picture(title: str, spans: list[Span]) -> list[str]:
    """Spans on a scale of their own: a long answer would else leave the first token no room."""
    if not spans:
        return []
    start, end = spans[0].start, spans[-1].end
    return [
        f"  {title + ':':<24} {duration(end - start):>9}",
        *(_row(span, start, end) for span in spans),
        "",
    ]


def _row(span: Span, start: int, end: int) -> str:
    took = duration(span.end - span.start)
    picture = bar(span.start - start, span.end - start, end - start)
    return f"  {span.phase:<14} {duration(span.start):>9} {took:>9}  {picture}".rstrip()


def bar(start: int, end: int, total: int) -> str:
    """From `start` to `end` of `total`, in eighths of a character and at least one of them."""
    scale = 8 * WIDTH / max(1, total)
    left = min(int(start * scale), 8 * WIDTH - 1)
    right = max(left + 1, round(end * scale))
    lead, inset = divmod(left, 8)
    # A bar cannot begin inside a character: what begins late in one begins with the next.
    lead = min(lead + (inset > 4), WIDTH - 1)
    size = max(1, right - 8 * lead)
    return " " * lead + "█" * (size // 8) + _EIGHTHS[size % 8].strip()


def _attempt(attempt: AttemptTrace) -> list[str]:
    decode = "answers alone"
    if attempt.decode is not None and attempt.decode != attempt.prefill:
        decode = f"→ {attempt.decode.name}"
    end = "" if attempt.ended is None else f" after {duration(attempt.ended - attempt.began)}"
    lines = [
        f"  attempt {attempt.number}: {attempt.prefill.name} {decode}, "
        f"{attempt.cause or 'running'}{end}"
    ]
    if attempt.verdict is not None:
        lines.append(f"    way      {_way(attempt.verdict)}")
    if attempt.timing is not None:
        timing, cached = attempt.timing, attempt.num_cached_tokens or 0
        lines.append(
            f"    prefill  computed for {_s(timing.compute_s)} (steps: {timing.num_steps}), "
            f"waited for {_s(timing.queue_s)}, cached tokens: {cached}"
        )
    if attempt.transfer is not None:
        lines.append(f"    handoff  {_transfer(attempt)}")
    if attempt.num_decode_messages:
        lines.append(f"    decode   {attempt.num_decode_messages} messages with tokens")
    return lines


def _way(verdict: Verdict) -> str:
    """What was chosen, why, and what either way would have taken by prediction."""
    chosen = "handed over" if verdict.hand_over else "served in place"
    text = f"{chosen} ({verdict.reason.value})"
    if verdict.over_s is None or verdict.in_place_s is None:
        return text
    ways = (verdict.over_s, verdict.in_place_s)
    over, here = (f"{_s(first)} + {_s(gap)}" for first, gap in ways)
    return f"{text}; predicted to the first token and the next: handoff {over}, in place {here}"


def _transfer(attempt: AttemptTrace) -> str:
    transfer = attempt.transfer
    assert transfer is not None
    if not transfer.num_bytes:
        return f"nothing to send; committed after {_s(transfer.commit_wait_s)}"
    rate = transfer.num_bytes / transfer.seconds if transfer.seconds else 0.0
    return (
        f"{size(transfer.num_bytes)} in {transfer.num_units} units by {transfer.transport}, "
        f"{_s(transfer.seconds)} ({size(rate)}/s); tail {size(transfer.tail_bytes)}, "
        f"{_s(transfer.tail_s)}; commit {_s(transfer.commit_wait_s)}"
    )


def _s(seconds: float) -> str:
    return duration(round(seconds * 1e6))


def duration(micros: int) -> str:
    """As short as can be read: microseconds to minutes."""
    if micros < 1_000:
        return f"{micros} µs"
    if micros < 1_000_000:
        return f"{micros / 1e3:.1f} ms"
    return f"{micros / 1e6:.2f} s"


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
