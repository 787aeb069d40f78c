"""Visits every state that a scenario can reach, nearest first, and checks the invariants in each.

    python -m tests.proof.explore [--depth N] [--scenario TEXT]

A state is the clock, the set of packets sent so far, and one number per node that stands for
everything in it. What an event does to a node depends on that node and the clock alone, so it is
computed once and remembered; all interleavings of several nodes are then combinations of numbers.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import cast
from unittest.mock import patch

from tests.proof.decode_model import DecodeModel, Secrets
from tests.proof.packets import Packet, must
from tests.proof.snapshot import Frozen, freeze, thaw
from tests.proof.world import SCENARIOS, STRANGER, Node, Scenario, reborn
from wire.fleet_messages import Gone
from wire.handoff_messages import Committed, LeaseEnded
from wire.types import NodeId

Event = tuple[str, int]  # within a node, without a packet
Happening = tuple[NodeId | None, Event | Packet | str]  # where, and what
State = tuple[int, ...]  # clock steps, set of packets as bits, one number per node
Step = tuple[int, int]  # the node after the event, the packets that it sent as bits
TICK = ("tick", 0)


class CounterexampleError(AssertionError):
    """An invariant is broken; the text is the shortest way there."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was visited."""

    scenario: str
    num_states: int
    num_transitions: int
    num_node_states: int
    depth: int
    complete: bool  # nothing lies beyond `depth`
    seconds: float  # of processor time
    outcomes: dict[str, int]  # how leases ended, over all states of the decode node

    def __str__(self) -> str:
        beyond = "all" if self.complete else "more beyond"
        return (
            f"{self.scenario}: {self.num_states:,} states ({beyond}), "
            f"{self.num_transitions:,} transitions, depth {self.depth}, "
            f"{self.num_node_states:,} node states, {self.seconds:.1f} s"
        )


@contextmanager
def chosen_secrets() -> Iterator[None]:
    """Keys depend on the lease alone: one event, one state. And refusals are no news here."""
    log = logging.getLogger("kvtransfer.receiver")
    with patch("kvtransfer.receiver.secrets", Secrets()), patch.object(log, "disabled", True):
        yield


class NodeStates:
    """All states of single nodes that were met, by number, and what events make of them."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.frozen: list[Frozen] = []
        self.names: list[NodeId] = []
        self.events: list[list[Event]] = []
        self.packets: list[Packet] = []
        self.outcomes: dict[str, int] = {}
        self._number_of: dict[Frozen, int] = {}
        self._newborn: dict[NodeId, int] = {}
        self._packet_bit: dict[Packet, int] = {}
        self._steps: dict[tuple[int, int, object], Step] = {}
        self._contradictions: dict[int, list[tuple[int, int]]] = {}  # among the packets so far
        self.dull: dict[tuple[int, int], int] = {}  # packets that change nothing, by node and clock

    def bit(self, packet: Packet) -> int:
        """The packet as a set of one."""
        if packet not in self._packet_bit:
            self._packet_bit[packet] = 1 << len(self.packets)
            self.packets.append(packet)
            self._contradictions.clear()
        return self._packet_bit[packet]

    def bits(self, packets: list[Packet]) -> int:
        together = 0
        for packet in (p for p in packets if p.receiver != STRANGER):  # who is not there
            for variant in self.scenario.with_confusion(packet):
                together |= self.bit(variant)
        return together

    def new(self, node: NodeId) -> int:
        """A node as it starts."""
        if node not in self._newborn:
            self._newborn[node] = self._number(self.scenario.build(node), 0.0)
        return self._newborn[node]

    def step(self, number: int, clock: int, event: Event | Packet) -> Step:
        """What the event does to the node, in clock step `clock`."""
        key = (number, clock, event)
        if key not in self._steps:
            self._steps[key] = self._compute(number, self.scenario.times[clock], event)
            if isinstance(event, Packet):
                self._check_receipt(number, clock, event)
                if self._steps[key] == (number, 0):
                    dull = self.dull.get((number, clock), 0)
                    self.dull[number, clock] = dull | self.bit(event)
        return self._steps[key]

    def _compute(self, number: int, now: float, event: Event | Packet) -> Step:
        node: Node = thaw(self.frozen[number])
        node.now = now
        if isinstance(event, Packet):
            node.receive(event)
        else:
            node.happen(event)
        sent, node.out = node.out, []
        if isinstance(node, DecodeModel):
            node.cache.take_events()
        return self._number(node, now), self.bits(sent)

    def _number(self, node: Node, now: float) -> int:
        node.now = 0.0
        frozen = freeze(node)
        number = self._number_of.get(frozen)
        if number is None:
            number = self._number_of[frozen] = len(self.frozen)
            self.frozen.append(frozen)
            self.names.append(node.me)
            self.events.append(node.events())
            self._check_node(node, now)
        return number

    def _check_node(self, node: Node, now: float) -> None:
        """The invariants of this state, and that everything in it comes to an end."""
        node.check()
        if isinstance(node, DecodeModel):
            for state in node.ended.values():
                self.outcomes[state.name] = self.outcomes.get(state.name, 0) + 1
            self.outcomes["REBOUND"] = self.outcomes.get("REBOUND", 0) + bool(node.num_rebound)
            quarantined = node.pool.counts().quarantined
            self.outcomes["QUARANTINED"] = self.outcomes.get("QUARANTINED", 0) + bool(quarantined)
        node.now = now
        node.drain()

    def contradictions(self, sent: int) -> list[tuple[int, int]]:
        """Of each answer among `sent`: its number, and the answers that exclude it as bits."""
        if sent not in self._contradictions:
            self._contradictions[sent] = [
                (index, self._excluding(packet))
                for index, packet in enumerate(self.packets)
                if sent >> index & 1 and isinstance(packet.message, Committed | LeaseEnded)
            ]
        return self._contradictions[sent]

    def _excluding(self, packet: Packet) -> int:
        """A later attempt may supersede one that was committed; nothing else changes an answer."""
        m = packet.message
        if isinstance(m, LeaseEnded) and m.cause == "superseded":
            return 0
        other = LeaseEnded if isinstance(m, Committed) else Committed
        assert isinstance(m, Committed | LeaseEnded)
        excluded = 0
        for p in self.packets:
            same = (p.sender, p.receiver) == (packet.sender, packet.receiver)
            if (
                same
                and isinstance(p.message, other)
                and (p.message.id, p.message.lease) == (m.id, m.lease)
            ):
                excluded |= self.bit(p)
        return excluded

    def _check_receipt(self, number: int, clock: int, packet: Packet) -> None:
        after, sent = self._steps[number, clock, packet]
        if packet.receiver != self.names[number]:
            must(after == number, f"what was meant for another life was heard: {packet}")
            answers = [p.message for i, p in enumerate(self.packets) if sent >> i & 1]
            must(all(isinstance(m, Gone) for m in answers), "another life's mail was answered")
        elif packet.forged:
            harmless = (number, self.step(number, clock, TICK)[0])
            must(after in harmless, f"a forgery had an effect: {packet}")


class Explorer:
    """Breadth first over one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.nodes = NodeStates(scenario)
        self.num_transitions = 0
        self._last_event: Happening = (None, "")
        self._addressed: dict[str, int] = {}  # node name: its packets as bits
        self._num_sorted = 0

    def first(self) -> State:
        numbers = [self.nodes.new(node) for node in self.scenario.nodes]
        return (0, self.nodes.bits(self.scenario.first_packets()), *numbers)

    def run(self, max_depth: int | None = None, max_states: int | None = None) -> Report:
        """Visit everything up to the bounds.

        Raises:
            CounterexampleError: with the shortest trace to a broken invariant.
        """
        began = time.process_time()
        with chosen_secrets(), self.scenario.credit():
            states = [self.first()]
            parents = {states[0]: -1}
            begin, depth = 0, 0
            while begin < len(states) and depth != max_depth:
                if max_states is not None and len(states) >= max_states:
                    break
                end = len(states)
                for at in range(begin, end):
                    for state in self._after(states, parents, at):
                        if state not in parents:
                            parents[state] = at
                            states.append(state)
                begin, depth = end, depth + 1
        return Report(
            self.scenario.name,
            len(states),
            self.num_transitions,
            len(self.nodes.frozen),
            depth,
            begin == len(states),
            time.process_time() - began,
            self.nodes.outcomes,
        )

    def _after(self, states: list[State], parents: dict[State, int], at: int) -> list[State]:
        try:
            return [state for _, state in self.successors(states[at])]
        except AssertionError as error:
            lines = [*self._trace(states, parents, at), self._last_event]
            text = "\n".join(f"  {number}. {told(e)}" for number, e in enumerate(lines, 1))
            raise CounterexampleError(f"{self.scenario.name}\n{text}\n  {error}") from error

    def _trace(self, states: list[State], parents: dict[State, int], at: int) -> list[Happening]:
        """The events that lead to state `at`, found again from parent to child."""
        path = [at]
        while (parent := parents[states[path[-1]]]) >= 0:
            path.append(parent)
        path.reverse()
        last = self._last_event
        trace = [
            next(event for event, after in self.successors(states[a]) if after == states[b])
            for a, b in pairwise(path)
        ]
        self._last_event = last
        return trace

    # ------------------------------------------------------------ what may happen

    def successors(self, state: State) -> Iterator[tuple[Happening, State]]:
        """Every event that changes anything, and the state after it."""
        clock, _, *numbers = state
        if clock + 1 < len(self.scenario.times):
            yield (None, "time passes"), (clock + 1, *state[1:])
        for place, number in enumerate(numbers, 2):
            name = self.nodes.names[number]
            arriving = self._arriving(name.name, number, state)
            for event in cast(
                "Iterator[Event | Packet]", chain(self.nodes.events[number], arriving)
            ):
                self.num_transitions += 1
                self._last_event = (name, event)
                after = self._move(state, place, event)
                if after != state:
                    yield self._last_event, after
            if name in self.scenario.restarts:
                yield (name, "restart"), self._restart(state, place, reborn(name))

    def _arriving(self, name: str, number: int, state: State) -> Iterator[Packet]:
        """Packets on the wire for a node, without those known to change nothing."""
        self._sort_packets()
        waiting = state[1] & self._addressed.get(name, 0)
        waiting &= ~self.nodes.dull.get((number, state[0]), 0)
        while waiting:
            lowest = waiting & -waiting
            waiting ^= lowest
            yield self.nodes.packets[lowest.bit_length() - 1]

    def _sort_packets(self) -> None:
        for packet in self.nodes.packets[self._num_sorted :]:
            name = packet.receiver.name
            self._addressed[name] = self._addressed.get(name, 0) | self.nodes.bit(packet)
        self._num_sorted = len(self.nodes.packets)

    def _move(self, state: State, place: int, event: Event | Packet) -> State:
        number, sent = self.nodes.step(state[place], state[0], event)
        if sent:
            self._check_answers(state[1], sent)
        return (state[0], state[1] | sent, *state[2:place], number, *state[place + 1 :])

    def _restart(self, state: State, place: int, life: NodeId) -> State:
        sent = self.nodes.bits(self.scenario.packets_after_restart(life))
        number = self.nodes.new(life)
        return (state[0], state[1] | sent, *state[2:place], number, *state[place + 1 :])

    def _check_answers(self, wire: int, sent: int) -> None:
        """A commit has one answer, however often it is asked."""
        for index, contradicting in self.nodes.contradictions(sent):
            if wire & contradicting:
                must(False, f"answered otherwise before: {self.nodes.packets[index]}")


def told(happening: Happening) -> str:
    """One line of a trace."""
    node, event = happening
    if isinstance(event, Packet):
        return f"{node} receives {event}"
    return f"{node or ''} {event}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--depth", type=int, help="events from the start; default: no bound")
    parser.add_argument("--states", type=int, help="stop a scenario after so many; default: never")
    parser.add_argument("--scenario", default="", help="only those whose name has this text")
    args = parser.parse_args()
    reports = []
    for scenario in SCENARIOS:
        if args.scenario in scenario.name:
            reports.append(Explorer(scenario).run(args.depth, args.states))
            print(reports[-1], reports[-1].outcomes, flush=True)
    num_states = sum(report.num_states for report in reports)
    num_transitions = sum(report.num_transitions for report in reports)
    seconds = sum(report.seconds for report in reports)
    print(f"together: {num_states:,} states, {num_transitions:,} transitions, {seconds:.0f} s")


if __name__ == "__main__":
    main()
