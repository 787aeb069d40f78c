"""What the judge learns of handoffs that it no longer makes."""

from __future__ import annotations

from router.judge import TRIAL_EVERY, Judge, Told
from router.pace import LivePace
from router.placement import Handoff, InPlace, Ways
from router.policy import Candidate
from router.way import Mode, Reason, Rules, Verdict
from wire.types import NodeId, NodeLoad, Role

LOAD = NodeLoad(num_running=4, blocks_total=100, blocks_free=90)
A = Candidate(NodeId("a", 1), Role.PREFILL, LOAD, 16, 1000)
B = Candidate(NodeId("b", 1), Role.DECODE, LOAD, 16, 1000)
WAYS = Ways((A, B), B)


def slow_once() -> LivePace:
    """The first handoff had to make its connection."""
    live = LivePace()
    live.prefilled(0, 100, 0.1)
    live.handed_over(7000, 5.0)
    live.streamed(20, 0.6)
    return live


def verdicts(judge: Judge, count: int, ways: Ways = WAYS) -> list[Verdict]:
    places = [judge.choose(ways, 100) for _ in range(count)]
    found = [place.verdict for place in places if isinstance(place, Handoff | InPlace)]
    return [verdict for verdict in found if verdict is not None]


def test_a_handoff_that_was_slow_once_is_tried_again() -> None:
    live = slow_once()
    judge = Judge(Rules(), live)
    found = verdicts(judge, 3 * TRIAL_EVERY)
    tried = [number for number, verdict in enumerate(found, 1) if verdict.hand_over]
    assert tried == [TRIAL_EVERY, 2 * TRIAL_EVERY, 3 * TRIAL_EVERY]
    assert found[TRIAL_EVERY - 1].reason is Reason.TRIAL
    assert found[0].reason is Reason.SOONER
    live.handed_over(7000, 0.005)
    again = verdicts(judge, 2)
    assert [(v.hand_over, v.reason) for v in again] == [(True, Reason.SOONER)] * 2


def test_a_trial_is_due_only_where_none_came_by_itself() -> None:
    judge = Judge(Rules(), slow_once())
    verdicts(judge, TRIAL_EVERY - 1)
    assert verdicts(judge, 1, Ways((A, B), None))[0].hand_over
    assert not any(v.hand_over for v in verdicts(judge, TRIAL_EVERY - 1))


def test_nothing_is_tried_against_a_rule_or_a_breaker_or_by_who_knows() -> None:
    live = slow_once()
    never = Judge(Rules(Mode.NEVER), live)
    knows = Judge(Rules(), Told(live.pace))
    for judge, ways in (
        (never, WAYS),
        (knows, WAYS),
        (Judge(Rules(), live), Ways((A, B), B, True)),
    ):
        assert not any(v.hand_over for v in verdicts(judge, 2 * TRIAL_EVERY, ways))
