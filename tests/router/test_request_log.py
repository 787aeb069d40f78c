"""What is remembered of requests, and for how long."""

from __future__ import annotations

import pytest

from router.request_log import RequestLog, RequestRecord
from router.server_timing import server_timing
from router.trace import ChoiceTrace
from router.waterfall import WIDTH, bar, duration, size, waterfall
from telemetry.timeline import Timeline
from wire.request_messages import HandoffDone, PrefillTiming, TokenUpdate, TransferRecord
from wire.types import AttemptId, NodeId

P, D, P2 = (NodeId(name, 1) for name in ("p", "d", "p2"))
TRANSFER = TransferRecord("shm", 4, 2_500_000, 0.5, 300_000, 0.002, 0.001)


def record(id: str, num_choices: int = 1) -> RequestRecord:
    choices = [ChoiceTrace(f"{id}-{i}", i, 10, Timeline(0.0)) for i in range(num_choices)]
    return RequestRecord(id, f"cmpl-{id}", "model", True, 1e9, choices)


def ids(log: RequestLog) -> list[str]:
    return [record.id for record in log.all()]


def test_the_oldest_make_room_for_the_latest() -> None:
    log = RequestLog(4)
    for number in range(6):
        log.begin(record(f"{number:x}"))
    for number in (1, 0, 3, 2, 4):
        found = log.find(f"cmpl-{number}")
        assert found is not None
        log.finish(found[0], 1.0)
    assert ids(log) == ["5", "4", "2", "3", "0"]
    assert log.find("1") is None


def test_room_is_counted_in_choices() -> None:
    log = RequestLog(4)
    for id, count in (("a", 2), ("b", 2), ("c", 1)):
        log.begin(record(id, count))
    for kept in reversed(log.all()):
        log.finish(kept, 1.0)
    assert ids(log) == ["c", "b"]
    log.begin(record("d", 9))  # more than there is room for: running it is there, then it is not
    assert ids(log)[0] == "d"
    log.finish(log.all()[0], 1.0)
    assert ids(log) == []


def test_nothing_is_kept_where_nothing_is_wanted() -> None:
    log = RequestLog(0)
    log.begin(record("a"))
    log.finish(record("a"), 1.0)
    assert ids(log) == []


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("cmpl-a", None),
        ("chatcmpl-a", None),
        ("a", None),
        ("cmpl-a-1", 1),
        ("a-0", 0),
        ("a-2", "unknown"),
        ("a-x", "unknown"),
        ("a-²", "unknown"),
        ("a-1-1", "unknown"),
        ("b", "unknown"),
        ("", "unknown"),
        ("-", "unknown"),
    ],
)
def test_names(name: str, index: int | str | None) -> None:
    log = RequestLog(4)
    log.begin(record("a", 2))
    found = log.find(name)
    assert ("unknown" if found is None else found[1]) == index


def test_what_never_began_ends_with_its_request() -> None:
    log, one = RequestLog(4), record("a", 2)
    log.begin(one)
    one.choices[0].ended("stop", 1.0)
    assert one.running
    log.finish(one, 2.0)
    assert not one.running
    assert [choice.end for choice in one.choices] == ["stop", "abort"]


def test_a_transfer_is_told_after_the_end() -> None:
    log, one = RequestLog(4), record("a")
    log.begin(one)
    one.choices[0].reserving(1, P, D, 1.0)
    one.choices[0].ended("stop", 2.0)
    log.finish(one, 2.0)
    for id in (AttemptId("a-0", 1), AttemptId("a-0", 2), AttemptId("a-7", 1), AttemptId("z", 1)):
        log.handoff_done(HandoffDone(id, TRANSFER))
    (attempt,) = one.choices[0].attempts
    assert attempt.transfer == TRANSFER
    assert attempt.cause == "finished"


# ---------------------------------------------------------------- one choice


def told() -> ChoiceTrace:
    """A choice whose first attempt died, with everything that nodes may tell."""
    trace = ChoiceTrace("a-0", 0, 10, Timeline(0.0))
    trace.timeline.body_read(0.001)
    trace.timeline.tokenized(0.002)
    trace.reserving(1, P, D, 0.003)
    trace.waiting(0.004)
    trace.reserving(2, P, D, 0.005)
    trace.prefilling(2, P, 0.006)
    trace.attempt_over("node_lost", 0.1)
    trace.reserving(3, P2, D, 0.101)
    trace.prefilling(3, P2, 0.102)
    timing = PrefillTiming(0.01, 0.02, 3)
    id = AttemptId("a-0", 3)
    trace.heard(TokenUpdate(id, 0, (5,), None, 8, timing=timing), False, 0.14)
    trace.output(1, 0.14)
    trace.heard(TokenUpdate(id, 0, (5,)), True, 0.15)
    for now in (0.16, 0.17):
        trace.heard(TokenUpdate(id, 1, (6,)), True, now)
        trace.output(1, now)
    trace.transferred(3, TRANSFER)
    trace.ended("length", 0.17)
    return trace


def test_attempts_and_refusals() -> None:
    trace = told()
    assert trace.num_refusals == 1
    assert [(a.number, a.prefill, a.cause) for a in trace.attempts] == [
        (2, P, "node_lost"),
        (3, P2, "finished"),
    ]
    assert trace.attempts[1].num_decode_messages == 2
    assert trace.attempts[1].num_cached_tokens == 8
    assert trace.num_output_tokens == 3
    trace.ended("abort", 9.0)
    assert trace.end == "length"


def test_server_timing_adds_up_to_the_first_token() -> None:
    assert server_timing(told()) == (
        "read;dur=1.000, tokenize;dur=1.000, queue;dur=4.000, retry;dur=95.000, "
        "reserve;dur=1.000, prefill-queue;dur=10.000, prefill;dur=20.000, network;dur=8.000, "
        "ttft;dur=140.000, handoff;dur=10.000, decode;dur=20.000"
    )


def test_there_is_no_server_timing_before_the_first_token() -> None:
    assert server_timing(ChoiceTrace("a-0", 0, 10, Timeline(0.0))) is None


def test_the_picture() -> None:
    one = record("a")
    one.choices = [told()]
    text = waterfall(one, None, 1.0)
    assert "to the first token:       140.0 ms" in text
    assert "attempt 2: p → d, node_lost after 95.0 ms" in text
    assert "computed for 20.0 ms (steps: 3), waited for 10.0 ms, cached tokens: 8" in text
    assert "2.5 MB in 4 units by shm, 500.0 ms (5.0 MB/s); tail 300.0 kB, 2.0 ms" in text
    assert "no decode node had room 1 times" in text


def test_a_picture_of_what_is_running() -> None:
    one = record("a", 2)
    text = waterfall(one, 1, 0.5)
    assert "choice 1: 10 prompt tokens, 0 output tokens, running" in text
    assert "choice 0" not in text
    assert "without a first token so far" in text


@pytest.mark.parametrize("total", [0, 1, 7, 1000])
def test_bars_are_visible_and_stay_in_the_picture(total: int) -> None:
    for start in range(total + 1):
        for end in (start, total):
            drawn = bar(start, end, total)
            assert drawn.strip()
            assert len(drawn) <= WIDTH
    assert bar(0, 1000, 1000) == "█" * WIDTH


def test_short_words() -> None:
    assert [duration(n) for n in (0, 999, 1500, 2_500_000)] == [
        "0 µs",
        "999 µs",
        "1.5 ms",
        "2.50 s",
    ]
    assert [size(n) for n in (5, 1500, 2.5e6, 3e12)] == ["5 B", "1.5 kB", "2.5 MB", "3000.0 GB"]
