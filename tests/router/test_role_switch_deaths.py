"""A node changes roles while a stream runs on it, and somebody dies: at every point, whoever it is.

The fleet, the switches and the dispatch are the real ones; nodes answer as they would. Whatever
dies, the client gets each token once, the switch ends, and the fleet serves on.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.stub_node import LAYOUT
from router.dispatch import Dispatch
from router.effects import Effect, Failed, Output, Send
from router.fleet import Fleet
from router.phase import Phase
from router.role_switch import DRAIN_S, RoleSwitch, RoleSwitches
from router.work import Prompt, Work
from tests.router.fleets import chooser_of
from tests.router.harness import MODEL
from tests.router.scripted_nodes import LIMITS, PROMPT, grant
from wire.fleet_messages import Register, SwitchRole
from wire.messages import Message
from wire.request_messages import (
    AttemptFailed,
    Granted,
    Prefill,
    Rebind,
    Reserve,
    TokenUpdate,
)
from wire.types import FinishReason, NodeId, Role, SamplingParams

TRUTH = (50, 51, 52, 53, 54, 55)
BEFORE = 3  # tokens that the switching node has said
SWITCHING, OTHER = NodeId("c", 1), NodeId("d", 1)
NEXT_LIFE = NodeId("c", 2)
NEVER_S = 30.0  # by then every wait is over


class World:
    """Two prefill nodes, two decode nodes, and a stream on one of these.

    Messages to nodes wait until `answer`; `dead` nodes say nothing more.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.fleet = Fleet(node_timeout_s=3, node_stall_s=60)
        for name in ("a", "b"):
            self.register(NodeId(name, 1), Role.PREFILL)
        self.register(SWITCHING, Role.DECODE)
        self.shown: list[int] = []
        self.finish: FinishReason | None = None
        self.inbox: list[tuple[NodeId, Message]] = []
        self.dead: set[NodeId] = set()
        self.over: list[RoleSwitch] = []
        self.switches = RoleSwitches(self.fleet, self._send, self.over.append)
        work = Work("r", Prompt(PROMPT), SamplingParams(max_tokens=len(TRUTH)))
        self.dispatch = Dispatch(work, chooser_of(self.fleet), LIMITS, 0)
        self.do(self.dispatch.place(0))
        while self.dispatch.phase is not Phase.DECODING:
            self.answer()
        self.inbox.clear()
        self.register(OTHER, Role.DECODE)

    def register(self, node: NodeId, role: Role) -> None:
        message = Register(role, MODEL, LAYOUT, 100, "tcp://a", (), "http://a")
        assert self.fleet.register(node, message, self.now).refusal is None

    def _send(self, node: NodeId, message: Message) -> None:
        assert isinstance(message, SwitchRole)

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            assert not isinstance(effect, Failed), effect
            if isinstance(effect, Send):
                self.inbox.append((effect.to, effect.message))
            elif isinstance(effect, Output):
                assert self.finish is None
                self.shown += effect.tokens
                self.finish = effect.finish

    def answer(self) -> None:
        """The node that was asked first does what it was asked for."""
        if not self.inbox:
            return
        node, message = self.inbox.pop(0)
        if node in self.dead or node not in self.fleet:
            return
        if isinstance(message, Reserve | Rebind):
            granted = Granted(message.id, grant(node, message.id.attempt))
            self.do(self.dispatch.granted(node, granted, self.now))
        elif isinstance(message, Prefill):
            self._hand_over(node, message)

    def _hand_over(self, node: NodeId, message: Prefill) -> None:
        """The prefill node samples one token, and the decode node repeats what there is."""
        known, decode = len(message.tokens) - len(PROMPT), self.dispatch.decode
        assert decode is not None
        for speaker, num_tokens in ((node, known + 1), (decode, max(BEFORE, known + 1))):
            if speaker not in self.dead:
                update = TokenUpdate(message.id, 0, TRUTH[:num_tokens])
                self.do(self.dispatch.tokens(speaker, update, self.now))

    def finish_stream(self) -> None:
        """Whoever has the request at last says the rest."""
        for _ in range(20):
            if self.dispatch.phase is Phase.WAITING:
                self.do(self.dispatch.place(self.now))
            self.answer()
            self.now += 0.2
            self.do(self.dispatch.tick(self.now))
            decode = self.dispatch.decode
            if self.dispatch.phase is Phase.DECODING and decode not in (SWITCHING, *self.dead):
                assert decode is not None
                rest = TokenUpdate(self.dispatch.id, 0, TRUTH, FinishReason.LENGTH)
                self.do(self.dispatch.tokens(decode, rest, self.now))

    def die(self, node: NodeId) -> None:
        """As the router's control does where a connection is closed."""
        self.dead.add(node)
        if node in self.fleet:
            self.leave(node)

    def leave(self, node: NodeId) -> None:
        self.fleet.remove(node)
        self.do(self.dispatch.node_lost(node, self.now))
        self.switches.died(node, self.now)


def order(w: World) -> None:
    if SWITCHING not in w.dead:
        w.switches.begin("c", Role.PREFILL, w.now, DRAIN_S)


def says_that_it_drains(w: World) -> None:
    if SWITCHING not in w.dead:
        w.fleet.drain(SWITCHING)
        w.switches.draining(SWITCHING)


def gives_its_stream_back(w: World) -> None:
    if SWITCHING not in w.dead:
        failed = AttemptFailed(w.dispatch.id, "drained", "another role", retryable=True)
        w.do(w.dispatch.attempt_failed(SWITCHING, failed, w.now))


def says_goodbye(w: World) -> None:
    if SWITCHING not in w.dead:
        w.switches.left(SWITCHING, w.now)
        w.leave(SWITCHING)


def comes_back(w: World) -> None:
    if SWITCHING not in w.dead:
        w.register(NEXT_LIFE, Role.PREFILL)
        w.switches.registered(NEXT_LIFE, Role.PREFILL, w.now)


def answer(w: World) -> None:
    w.answer()


STEPS: tuple[Callable[[World], None], ...] = (
    order,
    says_that_it_drains,
    gives_its_stream_back,
    answer,  # the abort to the old node, or the reservation
    answer,  # the grant
    says_goodbye,
    answer,  # the prompt is computed and handed over
    comes_back,
)
VICTIMS: dict[str, Callable[[World], NodeId | None]] = {
    "switching": lambda w: NEXT_LIFE if NEXT_LIFE in w.fleet else SWITCHING,
    "destination": lambda w: OTHER,
    "source": lambda w: w.dispatch.prefill,
}


@pytest.mark.parametrize("after", range(len(STEPS) + 1))
@pytest.mark.parametrize("victim", VICTIMS)
def test_somebody_dies_at_every_point(victim: str, after: int) -> None:
    w = World()
    assert (w.dispatch.decode, w.shown) == (SWITCHING, list(TRUTH[:BEFORE]))
    for number, step in enumerate((*STEPS, answer)):
        if number == after:
            node = VICTIMS[victim](w)
            assert node is not None
            w.die(node)
            if node == OTHER:
                w.register(NodeId("e", 1), Role.DECODE)  # else nobody can answer
        step(w)
    w.finish_stream()
    assert (w.shown, w.finish) == (list(TRUTH), FinishReason.LENGTH)
    w.now += NEVER_S
    w.switches.tick(w.now)
    assert [switch.outcome for switch in w.over] == expected(victim, after)
    assert w.fleet.ready
    roles = {node.id: node.info.role for node in w.fleet if node.serves}
    assert roles.get(NEXT_LIFE) is (None if victim == "switching" else Role.PREFILL)
    assert SWITCHING not in roles


def expected(victim: str, after: int) -> list[str]:
    """How the switch ends; before it was ordered there is none, and its end cannot be undone."""
    if victim != "switching" or after > STEPS.index(comes_back):
        return ["done"]
    if after == 0:
        return []
    return ["died"] if after <= STEPS.index(says_goodbye) else ["late"]
