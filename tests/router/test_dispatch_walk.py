"""The dispatch machine in random walks: messages are delayed, repeated, lost; nodes die."""

from __future__ import annotations

import random
from collections.abc import Collection

import pytest

from router.breaker import OF_TRANSFERS, Pair
from router.effects import AttemptEnded, Effect, Failed, HandedOver, Output, Send
from router.phase import Phase
from router.placement import InPlace, Nowhere, Place
from router.policy import Wishes
from router.work import Work
from tests.router.scripted_nodes import LENGTH, M1, M2, PROMPT, Nodes, grant, start
from wire.logprobs import UNKNOWN, Logprobs
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    Generate,
    Granted,
    Prefill,
    Rebind,
    Refused,
    Resend,
    Reserve,
    Tokens,
    TokenUpdate,
)
from wire.types import AttemptId, FinishReason, NodeId

TRUTH = [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]
ROWS = [b"row %d" % token for token in TRUTH]
PROMPT_ROWS = (b"prompt 1", b"prompt 2")


class AnyPlace(Nodes):
    """Nodes that may also serve alone; which way is taken is a matter of chance."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(mixed=[M1, M2])
        self.random = chance

    def place(
        self, work: Work, wishes: Wishes, refused: Collection[NodeId], *, one_token: bool
    ) -> Place | Nowhere:
        alone = [node for node in self.mixed if node not in refused]
        if alone and self.random.random() < 0.25:
            return InPlace(self.random.choice(alone))
        return super().place(work, wishes, refused, one_token=one_token)


class Walk:
    """Nodes that hold, lose, repeat and reorder messages, and die; the truth stays the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nodes = AnyPlace(self.random)
        self.dispatch = start(self.nodes, logprobs=0, prompt_logprobs=0)
        self.known: dict[AttemptId, int] = {}  # tokens that an attempt began with
        self.rows: list[bytes] = []
        self.now = 0.0
        self.shown: list[int] = []
        self.finish: FinishReason | None = None
        self.failure: Failed | None = None
        self.inbox: list[tuple[NodeId, Message]] = []  # to nodes
        self.outbox: list[tuple[NodeId, Message]] = []  # to the router
        self.holding: set[tuple[NodeId, AttemptId]] = set()  # nodes with work
        self.num_rebound = 0
        self.num_opened = 0
        self.num_in_place = 0
        self.judged: set[int] = set()  # attempts that were handed over
        self.do(self.dispatch.place(0))

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert self.finish is None
            assert self.failure is None
            if isinstance(effect, Send):
                self.check_sent(effect.to, effect.message)
                self.inbox.append((effect.to, effect.message))
            elif isinstance(effect, Output):
                self.shown += effect.tokens
                self.finish = effect.finish
                self.rows += effect.rows
                assert self.shown == TRUTH[: len(self.shown)]
                assert self.rows == ROWS[: len(self.shown)]
                assert self.dispatch.log.prompt_rows == PROMPT_ROWS
            elif isinstance(effect, Failed):
                self.failure = effect
            else:
                self.judge(effect)

    def judge(self, effect: Effect) -> None:
        """As the table of running choices does; what is blamed is one attempt's pair, once."""
        if isinstance(effect, HandedOver):
            assert self.dispatch.id.attempt not in self.judged
            self.judged.add(self.dispatch.id.attempt)
            assert effect.pair == (self.dispatch.prefill, self.dispatch.decode)
            self.nodes.breaker.committed(effect.pair)
        elif isinstance(effect, AttemptEnded) and effect.cause in OF_TRANSFERS:
            assert effect.pair is not None
            self.num_opened += self.nodes.breaker.failed(effect.pair, self.now)

    def check_sent(self, to: NodeId, message: Message) -> None:
        if isinstance(message, Rebind):
            assert list(message.output_tokens) == self.shown
            assert message.lease < message.id.attempt == self.dispatch.id.attempt
        if isinstance(message, Reserve):
            self.nodes.breaker.began(Pair(message.prefill, to), self.now)
        if isinstance(message, Reserve | Prefill | Generate):
            assert message.tokens == (*PROMPT, *self.shown)
            assert message.id.attempt == self.dispatch.id.attempt
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
        elif action < 0.82 and (living := self.nodes.all):
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
        for nodes in (self.nodes.prefill, self.nodes.decode, self.nodes.mixed):
            if node in nodes:
                nodes.remove(node)
        self.inbox = [(to, m) for to, m in self.inbox if to != node]
        self.outbox = [(by, m) for by, m in self.outbox if by != node]
        self.holding = {(by, id) for by, id in self.holding if by != node}
        self.do(self.dispatch.node_lost(node, self.now))

    def revive(self) -> None:
        nodes = self.nodes
        for living, name in ((nodes.prefill, "p1"), (nodes.decode, "d1"), (nodes.mixed, "m1")):
            if len(living) < 2:
                living.append(NodeId(name, self.random.randrange(1, 1 << 60)))

    def node_receives(self, node: NodeId, message: Message) -> None:
        if isinstance(message, Reserve | Prefill | Generate):
            self.known[message.id] = len(message.tokens) - message.num_prompt_tokens
        if isinstance(message, Reserve):
            if self.random.random() < 0.2:
                self.outbox.append((node, Refused(message.id, "capacity", "full", 0.1)))
            else:
                self.holding.add((node, message.id))
                self.outbox.append((node, Granted(message.id, grant(node, message.id.attempt))))
        elif isinstance(message, Rebind):
            self.rebind(node, message)
        elif isinstance(message, Prefill):
            self.prefill(node, message)
        elif isinstance(message, Generate):
            self.generate(node, message)
        elif isinstance(message, Abort | Ack):
            self.holding = {
                (by, id) for by, id in self.holding if by != node or id.attempt > message.id.attempt
            }
        elif isinstance(message, Resend):
            self.resend(node, message)

    def rebind(self, node: NodeId, message: Rebind) -> None:
        """Leases have their attempt's number here. Whatever the answer, lower attempts end."""
        held = {(node, AttemptId(message.id.request, message.lease))}
        known = held <= self.holding
        self.holding = {(by, id) for by, id in self.holding if by != node}
        if known and self.random.random() < 0.7:
            self.num_rebound += 1
            self.holding.add((node, message.id))
            self.outbox.append((node, Granted(message.id, grant(node, message.id.attempt))))
        else:
            self.outbox.append((node, Refused(message.id, "gone", "no lease", 0.1)))

    def prefill(self, node: NodeId, message: Prefill) -> None:
        known = len(message.tokens) - message.num_prompt_tokens
        assert list(message.tokens[message.num_prompt_tokens :]) == TRUTH[:known]
        if self.random.random() < 0.1:
            cause = "internal" if message.grant is None else "transport"
            self.outbox.append((node, AttemptFailed(message.id, cause, "broken", True)))
            return
        last = known + 1 == len(TRUTH)
        self.tell(node, message.id, known, known + 1)
        if message.grant is not None and not last:
            decode = message.grant.decode
            self.tell(decode, message.id, 0, self.random.randint(known + 1, len(TRUTH)))
            self.tell(decode, message.id, self.random.randint(0, known + 1))

    def generate(self, node: NodeId, message: Generate) -> None:
        """The answer to the offer may come later than what follows it, or not at all."""
        action = self.random.random()
        if action < 0.1:
            self.outbox.append((node, Refused(message.id, "capacity", "full", 0.1)))
        elif action < 0.2:
            pass  # it got lost
        else:
            known = self.known[message.id]
            self.num_in_place += 1
            self.holding.add((node, message.id))
            if self.random.random() < 0.8:
                self.tell(node, message.id, 0, known)
            self.tell(node, message.id, known, self.random.randint(known, len(TRUTH)))

    def resend(self, node: NodeId, message: Resend) -> None:
        if (node, message.id) in self.holding or node not in self.nodes.mixed:
            self.tell(node, message.id, message.index)
        else:
            self.outbox.append((node, AttemptFailed(message.id, "gone", "not here", True)))

    def tell(self, node: NodeId, id: AttemptId, start: int, end: int = len(TRUTH)) -> None:
        finish = LENGTH if end == len(TRUTH) else None
        known = self.known[id]  # of these nobody here ever knew the logprobs
        rows = [UNKNOWN] * known + ROWS[known:]
        prompt = () if start or known else PROMPT_ROWS
        logprobs = Logprobs(tuple(rows[start:end]), prompt)
        update = TokenUpdate(id, start, tuple(TRUTH[start:end]), finish, logprobs=logprobs)
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
    outcomes, num_rebound, num_opened, num_in_place = [], 0, 0, 0
    for seed in range(400):
        walk = Walk(seed)
        while walk.dispatch.phase is not Phase.ENDED:
            walk.step()
        outcomes.append(walk.finish is LENGTH)
        num_rebound += walk.num_rebound
        num_opened += walk.num_opened
        num_in_place += walk.num_in_place
    assert 100 < sum(outcomes) < 400
    assert num_rebound > 10
    assert num_opened > 10
    assert num_in_place > 100
