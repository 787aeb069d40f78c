"""Nodes that change roles while the fleet serves.

    DRAINING ── its life says goodbye ──▶ RETURNING ── the next life registers ──▶ DONE
        │ refuses, dies, is late              │ dies, is late, comes back as it was
        └─────────────────────────────────────┴──▶ FAILED

A node that is asked drains its role as it would at its end, and then registers as a new incarnation
with the other one; model, blocks and prefix cache stay. So nothing here moves a request: that is
what happens to all requests of a node that hands them back. Pure: no socket, time is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from router.fleet import Fleet
from router.fleet_node import Node
from wire.errors import BatonError, WireError
from wire.fleet_messages import SwitchRole
from wire.messages import Message
from wire.types import NodeId, Role

DRAIN_S = 5.0  # how long running requests may finish, where nobody says otherwise
MAX_DRAIN_S = 600.0
_RETURN_S = 10.0  # a life that is over, or should be, is followed by the next one within this
_ASK_AGAIN_S = 1.0
_MAX_REMEMBERED = 256  # nodes whose last switch is told


class State(StrEnum):
    """Where a switch is; the last two are final."""

    DRAINING = "draining"
    RETURNING = "returning"
    DONE = "done"
    FAILED = "failed"


class SwitchImpossible(BatonError):
    """There is no such node, or its switch would do harm now; the text says which."""

    def __init__(self, text: str, unknown: bool = False) -> None:
        super().__init__(text)
        self.unknown = unknown


@dataclass(slots=True)
class RoleSwitch:
    """One node's way from one role to another."""

    node: NodeId  # the life that was asked
    old: Role
    new: Role
    drain_s: float
    began: float
    asked: float  # for the last time
    heard: bool = False  # the node has said that it drains
    left: float | None = None  # its last request has ended, and it has said goodbye
    ended: float | None = None
    outcome: str = ""  # of the end: `done`, or why not; a metric's label
    reason: str = ""  # in words

    @property
    def state(self) -> State:
        if self.ended is not None:
            return State.DONE if self.outcome == "done" else State.FAILED
        return State.DRAINING if self.left is None else State.RETURNING

    @property
    def seconds(self) -> float | None:
        """From the question to the end."""
        return None if self.ended is None else self.ended - self.began

    @property
    def return_s(self) -> float | None:
        """From the end of the last request to the registration in the new role."""
        if self.ended is None or self.left is None or self.state is not State.DONE:
            return None
        return self.ended - self.left


class RoleSwitches:
    """The last switch of each node.

    Args:
        send: queues a message for a node; raises WireError.
        on_end: called once with each switch that is over.
    """

    def __init__(
        self,
        fleet: Fleet,
        send: Callable[[NodeId, Message], None],
        on_end: Callable[[RoleSwitch], None] = lambda switch: None,
    ) -> None:
        self._fleet = fleet
        self._send = send
        self._on_end = on_end
        self._switches: dict[str, RoleSwitch] = {}

    def all(self) -> list[RoleSwitch]:
        """The latest last."""
        return list(self._switches.values())

    def begin(self, name: str, role: Role, now: float, drain_s: float = DRAIN_S) -> RoleSwitch:
        """Ask the node called `name` to serve as `role`. Raises SwitchImpossible.

        Asked twice, it is the same switch. Whatever runs on the node may finish for `drain_s`;
        the rest moves to other nodes.
        """
        going = self.going(name)
        if going is not None and going.new is role:
            return going
        node = self._movable(name, role)
        switch = RoleSwitch(node.id, node.info.role, role, drain_s, now, now)
        try:
            self._send(node.id, SwitchRole(role, drain_s))
        except WireError as error:
            raise SwitchImpossible(f"node {name!r} cannot be reached: {error}") from error
        self._fleet.drain(node.id)
        self._switches.pop(name, None)
        self._switches[name] = switch
        while len(self._switches) > _MAX_REMEMBERED:
            del self._switches[next(iter(self._switches))]
        return switch

    def _movable(self, name: str, role: Role) -> Node:
        node = next((node for node in self._fleet if node.id.name == name), None)
        going = self.going(name)
        if going is not None:
            raise SwitchImpossible(f"node {name!r} is just becoming a {going.new} node")
        if node is None:
            raise SwitchImpossible(f"there is no node {name!r}", unknown=True)
        old = node.info.role
        if old is role:
            raise SwitchImpossible(f"node {name!r} is a {role} node already")
        if not node.serves:
            raise SwitchImpossible(f"node {name!r} does not serve now")
        if not self._can_spare(node, role):
            raise SwitchImpossible(f"node {name!r} is the only {old} node that serves")
        return node

    def _can_spare(self, node: Node, role: Role) -> bool:
        """Whether requests can be answered meanwhile, and prompts still be computed for others."""
        others = [other.info.role for other in self._fleet if other is not node and other.serves]
        answers = any(other.receives for other in others)
        computes = role.sends or not node.info.role.sends or any(other.sends for other in others)
        return answers and computes

    # ------------------------------------------------------------ what happens

    def draining(self, node: NodeId) -> None:
        """The node has said so."""
        if (switch := self._of(node)) is not None:
            switch.heard = True

    def refused(self, node: NodeId, reason: str, now: float) -> None:
        """The node stays what it is."""
        if (switch := self._of(node)) is not None:
            self._finish(switch, "refused", reason, now)

    def left(self, node: NodeId, now: float) -> None:
        """The node has said goodbye."""
        if (switch := self._of(node)) is not None:
            switch.left = now

    def died(self, node: NodeId, now: float) -> None:
        """The node is gone; without a goodbye, that was all."""
        switch = self._of(node)
        if switch is not None and switch.left is None:
            self._finish(switch, "died", "the node was lost", now)

    def registered(self, node: NodeId, role: Role, now: float) -> None:
        """A node is there. The same life may register once more, if its connection was lost."""
        switch = self.going(node.name)
        if switch is None or (switch.node == node and role is switch.old):
            return
        if role is switch.new:
            # The old life's goodbye has a connection of its own, and may come later or never.
            switch.left = now if switch.left is None else switch.left
            self._finish(switch, "done", "", now)
        else:
            self._finish(switch, "died", f"another life came back as a {role} node", now)

    def tick(self, now: float) -> None:
        """Ask again, and give up what takes too long."""
        for switch in self.all():
            if switch.ended is not None:
                continue
            since = switch.began + switch.drain_s if switch.left is None else switch.left
            if now - since > _RETURN_S:
                self._finish(switch, "late", f"it has been {switch.state} for too long", now)
            elif not switch.heard and now - switch.asked > _ASK_AGAIN_S:
                self._ask_again(switch, now)

    def _ask_again(self, switch: RoleSwitch, now: float) -> None:
        switch.asked = now
        if switch.node in self._fleet:
            try:
                self._send(switch.node, SwitchRole(switch.new, switch.drain_s))
            except WireError:
                return  # its connection is noticed elsewhere

    def _finish(self, switch: RoleSwitch, outcome: str, reason: str, now: float) -> None:
        switch.ended, switch.outcome, switch.reason = now, outcome, reason
        if not switch.heard and switch.node in self._fleet:
            self._fleet.resume(switch.node)  # it never began
        self._on_end(switch)

    def going(self, name: str) -> RoleSwitch | None:
        """The switch of the node of that name that is not over yet."""
        switch = self._switches.get(name)
        return switch if switch is not None and switch.ended is None else None

    def _of(self, node: NodeId) -> RoleSwitch | None:
        switch = self.going(node.name)
        return switch if switch is not None and switch.node == node else None
