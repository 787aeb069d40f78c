"""The dispatch machine: one choice over scripted nodes, step by step and in random walks."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

from router.dispatch import (
    AttemptEnded,
    Dispatch,
    DispatchLimits,
    Effect,
    Failed,
    NeedsCapacity,
    Output,
    Phase,
    Send,
)
from router.work import Prompt, Work
from wire.layout import KVLayout
from wire.messages import (
    Abort,
    Ack,
    AttemptFailed,
    Grant,
    Granted,
    Message,
    Prefill,
    Refused,
    Resend,
    Reserve,
    Tokens,
    TokenUpdate,
)
from wire.types import AttemptId, FinishReason, NodeId, SamplingParams

P1, P2, D1, D2 = (NodeId(name, 1) for name in ("p1", "p2", "d1", "d2"))
LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP
LIMITS = DispatchLimits(request_s=100, queue_s=10, reserve_s=2, silence_s=5)
PROMPT = (7, 8, 9)
MessageType = TypeVar("MessageType")


@dataclass
class Nodes:
    """A placer: the first living node of each list that may be used."""

    prefill: list[NodeId] = field(default_factory=lambda: [P1, P2])
    decode: list[NodeId] = field(default_factory=lambda: [D1, D2])

    def pick_prefill(self, work: Work, avoid: Collection[NodeId]) -> NodeId | None:
        return _first(self.prefill, avoid)

    def pick_decode(
        self, work: Work, avoid: Collection[NodeId], refused: Collection[NodeId]
    ) -> NodeId | None:
        return _first([node for node in self.decode if node not in refused], avoid)


def _first(nodes: list[NodeId], avoid: Collection[NodeId]) -> NodeId | None:
    preferred = [node for node in nodes if node not in avoid]
    return next(iter(preferred or nodes), None)


def start(nodes: Nodes | None = None, max_tokens: int = 10) -> Dispatch:
    work = Work("r", Prompt(PROMPT), SamplingParams(max_tokens=max_tokens))
    return Dispatch(work, nodes or Nodes(), LIMITS, now=0)


def grant(node: NodeId, lease: int = 1) -> Grant:
    secret = bytes(16)
    return Grant(lease, secret, secret, node, "u", (), KVLayout(1, 1, 1, 1, "float32"), (), 0, 1.0)


def one(effects: list[Effect], kind: type[MessageType]) -> tuple[NodeId, MessageType]:
    """The only message of this kind, and to whom it goes."""
    found = [e for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]
    assert len(found) == 1, effects
    assert isinstance(found[0].message, kind)
    return found[0].to, found[0].message


def aborted(effects: list[Effect]) -> set[tuple[NodeId, int]]:
    return {
        (effect.to, effect.message.id.attempt)
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Abort)
    }


def update(
    dispatch: Dispatch, index: int, *tokens: int, finish: FinishReason | None = None
) -> TokenUpdate:
    return TokenUpdate(dispatch.id, index, tokens, finish)


def prefilling(nodes: Nodes | None = None) -> Dispatch:
    dispatch = start(nodes)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    assert dispatch.phase is Phase.PREFILLING
    return dispatch


def decoding(nodes: Nodes | None = None) -> Dispatch:
    dispatch = prefilling(nodes)
    dispatch.tokens(P1, update(dispatch, 0, 50), 0)
    dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    assert dispatch.phase is Phase.DECODING
    return dispatch


def failed(dispatch: Dispatch, cause: str, retryable: bool = True) -> AttemptFailed:
    return AttemptFailed(dispatch.id, cause, "why", retryable)


def test_the_way_without_trouble() -> None:
    dispatch = start()
    to, reserve = one(dispatch.place(0), Reserve)
    assert (to, reserve.tokens, reserve.prefill) == (D1, PROMPT, P1)
    to, prefill = one(dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0), Prefill)
    assert (to, prefill.grant) == (P1, grant(D1))
    assert dispatch.tokens(P1, update(dispatch, 0, 50), 0) == [Output((50,), None)]
    assert dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0) == [Output((51,), None)]
    effects = dispatch.tokens(D1, update(dispatch, 2, 52, finish=STOP), 0)
    assert one(effects, Ack)[0] == D1
    assert effects[-1] == Output((52,), STOP)
    assert dispatch.phase is Phase.ENDED


def test_the_decode_node_may_speak_before_the_prefill_node() -> None:
    dispatch = prefilling()
    assert dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0) == [Output((50, 51), None)]
    assert dispatch.tokens(P1, update(dispatch, 0, 50), 0) == []


def test_one_token_needs_no_decode_node() -> None:
    dispatch = start(Nodes(decode=[]), max_tokens=1)
    to, prefill = one(dispatch.place(0), Prefill)
    assert (to, prefill.grant) == (P1, None)
    effects = dispatch.tokens(P1, update(dispatch, 0, 50, finish=LENGTH), 0)
    assert effects == [Output((50,), LENGTH)]


def test_a_refused_reservation_goes_to_the_next_node_then_to_the_queue() -> None:
    dispatch = start()
    dispatch.place(0)
    refusal = Refused(dispatch.id, "capacity", "full", 3.0)
    assert one(dispatch.refused(D1, refusal, 0), Reserve)[0] == D2
    assert dispatch.refused(D1, refusal, 0) == []  # not whom we asked
    assert dispatch.refused(D2, refusal, 0) == [NeedsCapacity(3.0)]
    assert dispatch.phase is Phase.WAITING
    assert one(dispatch.place(1), Reserve)[0] == D1


def test_waiting_has_one_limit_however_often_it_asks() -> None:
    dispatch = start()
    for now in range(0, 10, 2):
        assert dispatch.tick(now) == []
        dispatch.place(now)
        for node in (D1, D2):
            dispatch.refused(node, Refused(dispatch.id, "capacity", "full"), now)
    (effect,) = dispatch.tick(10.1)
    assert isinstance(effect, Failed)
    assert (effect.error.status, effect.error.retry_after_s) == (503, 5.0)
    assert dispatch.phase is Phase.ENDED


def test_a_request_that_no_node_can_hold_is_a_bad_request() -> None:
    dispatch = start()
    dispatch.place(0)
    *_, effect = dispatch.refused(D1, Refused(dispatch.id, "too_long", "no"), 0)
    assert isinstance(effect, Failed)
    assert (effect.error.status, effect.error.code) == (400, "context_length_exceeded")


def test_a_dead_decode_node_is_replaced_and_the_text_goes_on() -> None:
    nodes = Nodes()
    dispatch = decoding(nodes)
    nodes.decode.remove(D1)
    effects = dispatch.node_lost(D1, 1)
    assert AttemptEnded("node_lost") in effects
    assert aborted(effects) == {(P1, 1)}  # a dead node needs no abort
    to, reserve = one(effects, Reserve)
    assert (to, reserve.id.attempt) == (D2, 2)
    assert (reserve.tokens, reserve.num_prompt_tokens) == ((*PROMPT, 50, 51), 3)
    _, prefill = one(dispatch.granted(D2, Granted(dispatch.id, grant(D2)), 1), Prefill)
    assert (prefill.tokens, prefill.num_prompt_tokens) == ((*PROMPT, 50, 51), 3)
    assert dispatch.tokens(P1, update(dispatch, 2, 52), 1) == [Output((52,), None)]
    assert dispatch.tokens(D2, update(dispatch, 0, 50, 51, 52, 53), 1) == [Output((53,), None)]


def test_with_one_token_left_the_retry_reserves_nothing() -> None:
    nodes = Nodes()
    dispatch = start(nodes, max_tokens=3)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    effects = dispatch.node_lost(D1, 1)
    assert one(effects, Prefill)[1].grant is None


def test_a_dead_prefill_node_matters_only_before_the_decode_node_speaks() -> None:
    dispatch = decoding()
    assert dispatch.node_lost(P1, 1) == []
    assert dispatch.attempt_failed(P1, failed(dispatch, "superseded"), 1) == []
    dispatch = prefilling(Nodes(prefill=[P2]))
    dispatch.prefill = P1
    effects = dispatch.node_lost(P1, 1)
    assert aborted(effects) == {(D1, 1)}
    assert one(effects, Reserve)[1].prefill == P2


def test_a_stalled_node_lives_and_is_told() -> None:
    dispatch = decoding()
    assert aborted(dispatch.node_lost(D1, 1, alive=True)) == {(P1, 1), (D1, 1)}


@pytest.mark.parametrize("cause", ["digest", "divergence", "node_lost"])
def test_two_poisonings_end_the_request(cause: str) -> None:
    dispatch = prefilling()
    for attempt in (1, 2):
        assert dispatch.num_attempts == attempt
        assert dispatch.decode is not None
        dispatch.granted(dispatch.decode, Granted(dispatch.id, grant(dispatch.decode)), 0)
        if cause == "digest":
            effects = dispatch.attempt_failed(dispatch.decode, failed(dispatch, cause), 0)
        elif cause == "node_lost":
            effects = dispatch.node_lost(dispatch.decode, 0)
        else:
            dispatch.tokens(dispatch.decode, update(dispatch, 0, 50), 0)
            effects = dispatch.tokens(dispatch.decode, update(dispatch, 0, 99), 0)
    assert isinstance(effects[-1], Failed)
    assert effects[-1].error.status == 500
    assert dispatch.phase is Phase.ENDED


def test_other_failures_are_retried_a_bounded_number_of_times() -> None:
    dispatch = prefilling()
    for _ in range(20):
        effects = dispatch.attempt_failed(D1, failed(dispatch, "transport"), 0)
        if dispatch.phase is Phase.ENDED:
            break
    assert isinstance(effects[-1], Failed)
    assert dispatch.num_attempts == 6


def test_a_failure_that_cannot_be_retried_ends_the_request() -> None:
    dispatch = prefilling()
    effects = dispatch.attempt_failed(P1, failed(dispatch, "internal", retryable=False), 0)
    assert aborted(effects) == {(P1, 1), (D1, 1)}
    assert isinstance(effects[-1], Failed)


def test_an_unanswered_reservation_goes_elsewhere() -> None:
    dispatch = start()
    dispatch.place(0)
    assert dispatch.tick(1.9) == []
    effects = dispatch.tick(2.1)
    assert (D1, 1) in aborted(effects)
    to, reserve = one(effects, Reserve)
    assert (to, reserve.id.attempt) == (D2, 2)
    late = Granted(AttemptId("r", 1), grant(D1))
    assert dispatch.granted(D1, late, 3) == []


def test_what_cannot_be_sent_goes_elsewhere() -> None:
    dispatch = start()
    dispatch.place(0)
    effects = dispatch.cannot_send(D1, 0)
    assert one(effects, Reserve)[0] == D2
    assert (D1, 1) not in aborted(effects)


def test_the_deadline_ends_everything() -> None:
    dispatch = decoding()
    dispatch.tokens(D1, update(dispatch, 2, 52), 99)
    effects = dispatch.tick(100)
    assert aborted(effects) == {(P1, 1), (D1, 1)}
    assert isinstance(effects[-1], Failed)
    assert effects[-1].error.status == 504


def test_gaps_and_silence_ask_to_resend() -> None:
    dispatch = decoding()
    to, resend = one(dispatch.tokens(D1, update(dispatch, 4, 54), 1), Resend)
    assert (to, resend.index) == (D1, 2)
    assert dispatch.tick(2) == []
    to, resend = one(dispatch.tick(6.5), Resend)
    assert (to, resend.index) == (D1, 2)
    assert dispatch.tick(7) == []


def test_cancel_tells_both_nodes() -> None:
    dispatch = decoding()
    assert aborted(dispatch.cancel()) == {(P1, 1), (D1, 1)}
    assert dispatch.tokens(D1, update(dispatch, 2, 52), 0) == []
    assert dispatch.cancel() == []


# ---------------------------------------------------------------- random walks

TRUTH = [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]


class Walk:
    """Nodes that hold, lose, repeat and reorder messages, and die; the truth stays the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes = Nodes()
        self.dispatch = start(self.nodes)
        self.now = 0.0
        self.shown: list[int] = []
        self.finish: FinishReason | None = None
        self.failure: Failed | None = None
        self.inbox: list[tuple[NodeId, Message]] = []  # to nodes
        self.outbox: list[tuple[NodeId, Message]] = []  # to the router
        self.holding: set[tuple[NodeId, AttemptId]] = set()  # nodes with work
        self.do(self.dispatch.place(0))

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert self.finish is None
            assert self.failure is None
            if isinstance(effect, Send):
                self.check_sent(effect.message)
                self.inbox.append((effect.to, effect.message))
            elif isinstance(effect, Output):
                self.shown += effect.tokens
                self.finish = effect.finish
                assert self.shown == TRUTH[: len(self.shown)]
            elif isinstance(effect, Failed):
                self.failure = effect

    def check_sent(self, message: Message) -> None:
        if isinstance(message, Reserve | Prefill):
            assert message.tokens == (*PROMPT, *self.shown)
            assert message.id.attempt == self.dispatch.num_attempts
        if isinstance(message, Prefill) and message.grant is not None:
            assert message.grant.lease == message.id.attempt

    def step(self) -> None:
        self.now += self.random.uniform(0, 0.5)
        action = self.random.random()
        if action < 0.4 and self.inbox:
            self.node_receives(*self.inbox.pop(self.first_of_some_node()))
        elif action < 0.8 and self.outbox:
            at = self.random.randrange(len(self.outbox))
            keep = self.random.random() < 0.2  # told twice
            self.router_receives(*(self.outbox[at] if keep else self.outbox.pop(at)))
        elif action < 0.82 and (living := [*self.nodes.prefill, *self.nodes.decode]):
            self.kill(self.random.choice(living))
        elif action < 0.86:
            self.revive()
        else:
            self.do(self.dispatch.tick(self.now))
        if self.dispatch.phase is Phase.WAITING and self.random.random() < 0.3:
            self.do(self.dispatch.place(self.now))

    def first_of_some_node(self) -> int:
        """Sockets keep the order of messages to one node, not that between nodes."""
        node, _ = self.random.choice(self.inbox)
        return [to for to, _ in self.inbox].index(node)

    def kill(self, node: NodeId) -> None:
        for nodes in (self.nodes.prefill, self.nodes.decode):
            if node in nodes:
                nodes.remove(node)
        self.inbox = [(to, m) for to, m in self.inbox if to != node]
        self.outbox = [(by, m) for by, m in self.outbox if by != node]
        self.holding = {(by, id) for by, id in self.holding if by != node}
        self.do(self.dispatch.node_lost(node, self.now))

    def revive(self) -> None:
        for nodes, known in ((self.nodes.prefill, (P1, P2)), (self.nodes.decode, (D1, D2))):
            if len(nodes) < 2:
                life = self.random.randrange(1, 1 << 60)
                nodes.append(NodeId(known[0].name, life))

    def node_receives(self, node: NodeId, message: Message) -> None:
        if isinstance(message, Reserve):
            if self.random.random() < 0.2:
                self.outbox.append((node, Refused(message.id, "capacity", "full", 0.1)))
            else:
                self.holding.add((node, message.id))
                self.outbox.append((node, Granted(message.id, grant(node, message.id.attempt))))
        elif isinstance(message, Prefill):
            self.prefill(node, message)
        elif isinstance(message, Abort | Ack):
            self.holding = {
                (by, id) for by, id in self.holding if by != node or id.attempt > message.id.attempt
            }
        elif isinstance(message, Resend):
            self.tell(node, message.id, message.index)

    def prefill(self, node: NodeId, message: Prefill) -> None:
        known = len(message.tokens) - message.num_prompt_tokens
        assert list(message.tokens[message.num_prompt_tokens :]) == TRUTH[:known]
        if self.random.random() < 0.1:
            self.outbox.append((node, AttemptFailed(message.id, "transport", "broken", True)))
            return
        last = known + 1 == len(TRUTH)
        first = TokenUpdate(message.id, known, (TRUTH[known],), LENGTH if last else None)
        self.outbox.append((node, _tokens(first)))
        if message.grant is not None and not last:
            decode = message.grant.decode
            self.tell(decode, message.id, 0, self.random.randint(known + 1, len(TRUTH)))
            self.tell(decode, message.id, self.random.randint(0, known + 1))

    def tell(self, node: NodeId, id: AttemptId, start: int, end: int = len(TRUTH)) -> None:
        finish = LENGTH if end == len(TRUTH) else None
        update = TokenUpdate(id, start, tuple(TRUTH[start:end]), finish)
        self.outbox.append((node, _tokens(update)))

    def router_receives(self, sender: NodeId, message: Message) -> None:
        if isinstance(message, Granted):
            self.do(self.dispatch.granted(sender, message, self.now))
        elif isinstance(message, Refused):
            self.do(self.dispatch.refused(sender, message, self.now))
        elif isinstance(message, AttemptFailed):
            self.do(self.dispatch.attempt_failed(sender, message, self.now))
        else:
            self.do(self.dispatch.tokens(sender, _update(message), self.now))

    def settle(self) -> None:
        """Deliver what is left to the nodes, in order."""
        while self.inbox:
            node, message = self.inbox.pop(0)
            if isinstance(message, Abort | Ack):
                self.node_receives(node, message)


def _tokens(update: TokenUpdate) -> Message:
    return Tokens((update,))


def _update(message: Message) -> TokenUpdate:
    assert isinstance(message, Tokens)
    return message.updates[0]


@pytest.mark.parametrize("block", range(10))
def test_random_walks_end_with_the_truth_or_an_error_and_leak_nothing(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        walk = Walk(seed)
        for _ in range(5000):
            if walk.dispatch.phase is Phase.ENDED:
                break
            walk.step()
        assert walk.dispatch.phase is Phase.ENDED, seed
        assert (walk.finish is LENGTH and walk.shown == TRUTH) or walk.failure is not None
        walk.settle()
        held = {id for _, id in walk.holding}
        ended_by_prefill_node = {walk.dispatch.id} if walk.finish else set()  # it frees the lease
        assert held <= ended_by_prefill_node, seed


def test_most_walks_succeed() -> None:
    """Guards the walk itself: errors are allowed above, but not as the rule."""
    outcomes = []
    for seed in range(200):
        walk = Walk(seed)
        while walk.dispatch.phase is not Phase.ENDED:
            walk.step()
        outcomes.append(walk.finish is LENGTH)
    assert 50 < sum(outcomes) < 200
