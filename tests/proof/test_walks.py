"""Random walks far beyond what is explored: more requests, attempts, restarts, and events.

The nodes and invariants are the explorer's. At the end of a walk nothing more is lost, and every
attempt that its prefill node still works on must come through.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from tests.proof.decode_model import DecodeModel
from tests.proof.explore import chosen_secrets
from tests.proof.packets import ROUTER, TTL, Packet
from tests.proof.prefill_model import PrefillModel
from tests.proof.world import ANYTHING, Attempt, Node, Scenario, reborn
from wire.handoff_messages import UnitHeader, UnitsReceived
from wire.request_messages import Abort
from wire.types import AttemptId, NodeId

NUM_WALKS = 60
NUM_EVENTS = 400
REQUESTS = "rstu"
MAX_ON_THE_WIRE = 60


class Walk:
    """One decode node, two prefill nodes, four requests with as many attempts as it takes."""

    def __init__(self, seed: int, **chosen: Any) -> None:
        self.random = random.Random(seed)
        scenario = Scenario(
            "walk",
            (),
            num_tokens=self.random.choice([2, 3, 5]),
            num_decode_blocks=self.random.choice([3, 5, 8]),
            num_prefill_blocks=12,
            num_layer_groups=self.random.choice([1, 2]),
            ways_to_land=self.random.choice([("land",), ANYTHING]),
            narrow=self.random.choice([False, True]),
        )
        self.scenario = replace(scenario, **chosen)
        self.lives = {name: NodeId(name, 1) for name in "dab"}
        self.nodes: dict[str, Node] = {
            name: self.scenario.build(node) for name, node in self.lives.items()
        }
        self.attempts = dict.fromkeys(REQUESTS, 0)
        self.wire: list[Packet] = []
        self.now = 0.0
        self.num_rebound = 0
        self.hopeless: set[bytes] = set()  # capabilities of leases whose units were lost

    def step(self) -> None:
        dice = self.random.random()
        if dice < 0.5 and self.wire:
            self.deliver(self.random.choice(self.wire))
        elif dice < 0.9:
            self.let_happen(self.random.choice("ddab"))
        elif dice < 0.94:
            self.new_attempt(self.random.choice(REQUESTS))
        elif dice < 0.96:
            self.now += self.random.choice([0.01, 0.3, 0.6, 1.1]) * TTL
        elif dice < 0.97:
            self.abort(self.random.choice(REQUESTS))
        elif dice < 0.98:
            self.restart(self.random.choice("dab"))
        while len(self.wire) > MAX_ON_THE_WIRE:
            lost = self.wire.pop(self.random.randrange(len(self.wire))).message
            if isinstance(lost, UnitHeader):  # units are sent once: their lease has to expire
                self.hopeless.add(lost.capability)

    def new_attempt(self, request: str) -> None:
        self.attempts[request] = min(255, self.attempts[request] + 1)
        id = AttemptId(request, self.attempts[request])
        prefill = self.lives[self.random.choice("ab")]
        rebinds = self.lease_of(request) if self.random.random() < 0.7 else 0
        self.wire.append(self.scenario.ask(Attempt(id, prefill, self.lives["d"], rebinds)))
        if rebinds:
            self.deliver(self.wire[-1])
            self.num_rebound += self.lease_of(request) > rebinds

    def lease_of(self, request: str) -> int:
        """As its router would know from the grant; 0: there is none."""
        decode = self.nodes["d"]
        assert isinstance(decode, DecodeModel)
        pending = decode.pending.get(request)
        return 0 if pending is None else pending.lease

    def abort(self, request: str) -> None:
        id = AttemptId(request, self.attempts[request])
        self.wire += [Packet(ROUTER, life, Abort(id)) for life in self.lives.values()]

    def restart(self, name: str) -> None:
        self.lives[name] = reborn(self.lives[name])
        self.nodes[name] = self.scenario.build(self.lives[name])

    def deliver(self, packet: Packet) -> None:
        node = self.nodes.get(packet.receiver.name)
        if node is not None:
            node.now = self.now
            node.receive(packet)
            self.settle(node)

    def let_happen(self, name: str) -> None:
        node = self.nodes[name]
        events = node.events()
        if events:
            node.now = self.now
            node.happen(self.random.choice(events))
            self.settle(node)

    def settle(self, node: Node) -> None:
        node.check()
        self.wire += node.out
        node.out.clear()

    # ------------------------------------------------------------ the end

    def come_to_rest(self) -> None:
        """Nothing is lost any more; nobody asks for anything new."""
        for _ in range(40):
            self.take_turns()
        decode = self.nodes["d"]
        assert isinstance(decode, DecodeModel)
        for pending in decode.pending.values():
            prefill = self.nodes[pending.message.prefill.name]
            assert isinstance(prefill, PrefillModel)
            work = prefill.work.get(pending.message.id.request)
            alive = prefill.me == pending.message.prefill
            lease = decode.table._leases[pending.lease]
            assert lease.capability in self.hopeless or not (
                alive and work and work.id == pending.message.id
            ), f"{work} is stuck"

    def take_turns(self) -> None:
        """All that is on the wire arrives, and every node does what it can."""
        packets, self.wire = list(dict.fromkeys(self.wire)), []
        for packet in packets:
            self.deliver(packet)
        self.work_off()

    def work_off(self) -> None:
        """Everything that nodes can do by themselves, without damage."""
        for node in self.nodes.values():
            for kind in ("renew", "compute", "carry out send", "land"):
                for _ in range(4 * self.scenario.num_prefill_blocks):
                    event = next((e for e in node.events() if e[0] == kind), None)
                    if event is None:
                        break
                    node.now = self.now
                    node.happen(event)
                    self.settle(node)
            self.now += 0.6  # commits are asked again
            node.now = self.now
            node.happen(("tick", 0))
            self.settle(node)

    def num_running(self) -> int:
        decode = self.nodes["d"]
        assert isinstance(decode, DecodeModel)
        return len(decode.running)

    def end(self) -> None:
        for node in self.nodes.values():
            node.now = self.now
            node.drain()


@pytest.mark.parametrize("seed", range(NUM_WALKS))
def test_walk(seed: int) -> None:
    walk = Walk(seed)
    with chosen_secrets(), walk.scenario.credit():
        for _ in range(NUM_EVENTS):
            walk.step()
        walk.come_to_rest()
        walk.end()


def test_walks_rebind() -> None:
    walks = [Walk(seed) for seed in range(8)]
    for walk in walks:
        with chosen_secrets(), walk.scenario.credit():
            for _ in range(NUM_EVENTS):
                walk.step()
    assert sum(walk.num_rebound for walk in walks) > 5


def test_walks_get_somewhere() -> None:
    walk = Walk(0)
    with chosen_secrets(), walk.scenario.credit():
        for request in REQUESTS[:1]:
            walk.new_attempt(request)
        walk.come_to_rest()
        assert walk.num_running() == 1
        walk.end()


def test_a_window_opens_again_when_its_acknowledgements_were_lost() -> None:
    """All of them for a while; nobody repeats them but in answer to a renewal."""
    walk = Walk(0, num_tokens=5, num_decode_blocks=3, ways_to_land=("land",), narrow=True)
    with chosen_secrets(), walk.scenario.credit():
        walk.new_attempt("r")
        for _ in range(10):
            walk.take_turns()
            walk.wire = [p for p in walk.wire if not isinstance(p.message, UnitsReceived)]
        assert walk.num_running() == 0, "the window has not closed"
        walk.come_to_rest()
        assert walk.num_running() == 1
        walk.end()
