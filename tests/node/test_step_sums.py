"""What a node counts of its steps, so that routers can hold it against a profile."""

from __future__ import annotations

from engine.plan import DraftCounts, StepResult, StepShape
from node.stats import NodeStats
from wire.types import StepSums

PREFILL = StepShape(prefill_tokens=100, prefill_squares=10_000)
DECODE = StepShape(decode_batch=3, decode_context=900)


def test_steps_are_summed_up_by_kind() -> None:
    stats = NodeStats()
    for shape, seconds in ((PREFILL, 0.5), (DECODE, 0.125), (PREFILL, 0.25), (DECODE, 0.25)):
        stats.count_step(StepResult(1, (), 9, 0, seconds=seconds, shape=shape))
    assert stats.prefill_steps == StepSums(2, 200, 20_000, 0.75)
    assert stats.decode_steps == StepSums(2, 1800, 6, 0.375)


def test_steps_that_did_both_or_drafted_tell_nothing() -> None:
    stats = NodeStats()
    both = StepShape(100, 10_000, 3, 900)
    stats.count_step(StepResult(1, (), 9, 0, seconds=0.5, shape=both))
    drafted = DraftCounts(((2, 1),), 0.0)
    stats.count_step(StepResult(2, (), 9, 0, seconds=0.5, shape=PREFILL, speculation=drafted))
    stats.count_step(StepResult(3, (), 9, 0, seconds=0.5))
    assert stats.prefill_steps == stats.decode_steps == StepSums()
