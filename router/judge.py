"""Chooses between the ways that `node_chooser` has found, by rules and by the pace that is known.

Handoffs are known by handoffs alone. One that was slow once, because a connection was being made or
a link was full, would keep all that follow in place, and nobody would learn that it was over: so
of many in a row that are better served in place one is handed over all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from router.pace import STREAM_S, Pace
from router.placement import Handoff, InPlace, Place, Ways
from router.policy import Candidate
from router.way import NO_STREAMS, Over, Part, Reason, Rules, Verdict, choose_way
from tuner.latency import StepWork
from wire.types import Role

TRIAL_EVERY = 100  # choices: a trial costs one of them at most what was predicted


class KnowsPace(Protocol):
    """A router's `LivePace`, or what a planner was told."""

    @property
    def pace(self) -> Pace | None: ...

    @property
    def learns(self) -> bool:
        """Whether it follows what is tried."""
        ...


@dataclass(frozen=True, slots=True)
class Told:
    """A pace that does not change."""

    pace: Pace | None
    learns: bool = False


class Judge:
    """One router's choice. Which node of a kind is best has been decided before."""

    def __init__(self, rules: Rules, known: KnowsPace) -> None:
        self.rules = rules
        self._known = known
        self._num_kept = 0  # choices in a row that predictions kept in place

    @property
    def pace(self) -> Pace | None:
        return self._known.pace

    def choose(self, ways: Ways, num_tokens: int) -> Place | None:
        """How a prompt is served; None if there is no way."""
        if ways.handoff is None and ways.in_place is None:
            return None
        over = None if ways.handoff is None else _over(*ways.handoff, num_tokens, ways.failing)
        here = None if ways.in_place is None else _part(ways.in_place, num_tokens)
        verdict = self._tried(choose_way(over, here, self.pace, self.rules))
        if verdict.hand_over:
            assert ways.handoff is not None
            prefill, decode = ways.handoff
            return Handoff(prefill.id, decode.id, verdict)
        assert ways.in_place is not None
        return InPlace(ways.in_place.id, verdict)

    def _tried(self, verdict: Verdict) -> Verdict:
        """The verdict, or the other way if that has not been tried for long."""
        if verdict.hand_over:
            self._num_kept = 0
        elif verdict.over_s is not None and self._known.learns:
            self._num_kept += 1
        if self._num_kept < TRIAL_EVERY:
            return verdict
        self._num_kept = 0
        return replace(verdict, hand_over=True, reason=Reason.TRIAL)

    @property
    def stream_s(self) -> float:
        """How long streams last: what prompts took of a node's time is forgotten with them."""
        pace = self.pace
        return STREAM_S if pace is None else pace.stream_s


def _over(prefill: Candidate, decode: Candidate, num_tokens: int, failing: bool) -> Over:
    missing = num_tokens - min(decode.num_cached_tokens, num_tokens)
    num_bytes = -(-missing // decode.block_size) * decode.block_bytes
    return Over(_part(prefill, num_tokens), _streams(decode), decode.taken_s, num_bytes, failing)


def _part(node: Candidate, num_tokens: int) -> Part:
    queued = max(node.load.queued_tokens, node.pending_tokens)
    return Part(num_tokens, node.num_cached_tokens, queued, _streams(node), node.taken_s)


def _streams(node: Candidate) -> StepWork:
    """As far as it is known here: the last heartbeat's, and what this router sent since."""
    if node.role is Role.PREFILL:
        return NO_STREAMS
    num_blocks = node.load.blocks_total - node.load.blocks_free
    batch = max(node.load.num_running, node.num_assigned)
    return StepWork(decode_batch=batch, decode_context=num_blocks * node.block_size)
