"""A node's change of role as the router sees it: the states, and what the admin route answers."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.stub_node import LAYOUT, StubNode
from router.fleet import Fleet
from router.role_switch import RoleSwitch, RoleSwitches, State, SwitchImpossible
from tests.router import tiny_tokenizer
from tests.router.harness import MODEL, Answer, Harness, endless, eventually, router
from wire.errors import WireError
from wire.fleet_messages import Draining, Goodbye, Register, SwitchRefused, SwitchRole
from wire.messages import Message
from wire.request_messages import AttemptFailed
from wire.types import NodeId, Role

A, B, C, D = (NodeId(name, 1) for name in "abcd")
NEXT_C = NodeId("c", 2)


class World:
    """Two prefill nodes (a, b), two decode nodes (c, d)."""

    def __init__(self) -> None:
        self.fleet = Fleet(node_timeout_s=3, node_stall_s=60)
        for node, role in ((A, Role.PREFILL), (B, Role.PREFILL), (C, Role.DECODE)):
            self.register(node, role)
        self.register(D, Role.DECODE)
        self.sent: list[tuple[NodeId, Message]] = []
        self.away = False
        self.over: list[RoleSwitch] = []
        self.switches = RoleSwitches(self.fleet, self._send, self.over.append)

    def register(self, node: NodeId, role: Role) -> None:
        message = Register(role, MODEL, LAYOUT, 100, "tcp://a", (), "http://a")
        assert self.fleet.register(node, message, 0).refusal is None

    def _send(self, node: NodeId, message: Message) -> None:
        if self.away:
            raise WireError("it is away")
        self.sent.append((node, message))

    def begin(self, name: str = "c", role: Role = Role.PREFILL) -> RoleSwitch:
        return self.switches.begin(name, role, 0.0, 5.0)


def test_a_switch_that_goes_well() -> None:
    w = World()
    switch = w.begin()
    assert w.sent == [(C, SwitchRole(Role.PREFILL, 5.0))]
    assert not w.fleet[C].serves
    assert w.begin() is switch, "asked twice"
    w.switches.draining(C)
    assert str(switch.state) == "draining"
    w.switches.left(C, 3.0)
    w.switches.died(C, 3.1)
    assert str(switch.state) == "returning"
    w.switches.registered(NEXT_C, Role.PREFILL, 3.5)
    assert (switch.state, switch.seconds, switch.return_s) == (State.DONE, 3.5, 0.5)
    assert w.over == [switch]
    assert len(w.sent) == 1


def test_the_next_life_overtakes_the_goodbye() -> None:
    w = World()
    switch = w.begin()
    w.switches.draining(C)
    w.switches.registered(NEXT_C, Role.PREFILL, 3.5)
    w.switches.left(C, 3.6)
    assert (switch.state, switch.seconds, switch.return_s) == (State.DONE, 3.5, 0.0)


def test_what_cannot_be() -> None:
    w = World()
    with pytest.raises(SwitchImpossible, match="no node 'x'") as unknown:
        w.begin("x")
    assert unknown.value.unknown
    with pytest.raises(SwitchImpossible, match="is a decode node already"):
        w.begin(role=Role.DECODE)
    w.begin()
    with pytest.raises(SwitchImpossible, match="just becoming a prefill node"):
        w.begin(role=Role.DECODE)
    with pytest.raises(SwitchImpossible, match="the only decode node"):
        w.begin("d")
    w.fleet.mark_unreachable(A)
    with pytest.raises(SwitchImpossible, match="does not serve now"):
        w.begin("a", Role.DECODE)
    with pytest.raises(SwitchImpossible, match="the only prefill node"):
        w.begin("b", Role.DECODE)
    w.away = True
    w.fleet.heartbeat(A, w.fleet[A].load, 0)
    with pytest.raises(SwitchImpossible, match="cannot be reached"):
        w.begin("a", Role.DECODE)
    assert w.fleet[A].serves


def test_who_may_go_while_requests_can_be_answered() -> None:
    """A lone pair becomes two mixed nodes, one after the other, and a pair again."""
    w = World()
    w.fleet.remove(B)
    w.fleet.remove(D)
    with pytest.raises(SwitchImpossible, match="the only decode node"):
        w.begin("c", Role.MIXED)
    with pytest.raises(SwitchImpossible, match="the only prefill node"):
        w.begin("a", Role.DECODE)
    w.begin("a", Role.MIXED)  # meanwhile the decode node serves alone
    with pytest.raises(SwitchImpossible, match="the only decode node"):
        w.begin("c", Role.MIXED)
    w.register(NodeId("a", 2), Role.MIXED)
    w.switches.registered(NodeId("a", 2), Role.MIXED, 1.0)
    w.begin("c", Role.MIXED)
    w.register(NEXT_C, Role.MIXED)
    w.switches.registered(NEXT_C, Role.MIXED, 2.0)
    w.begin("c", Role.DECODE)
    w.register(NodeId("c", 3), Role.DECODE)
    w.switches.registered(NodeId("c", 3), Role.DECODE, 3.0)
    assert w.begin("a", Role.PREFILL).old is Role.MIXED
    assert [switch.outcome for switch in w.over] == ["done"] * 3


def test_a_node_that_refuses_serves_on_as_before() -> None:
    w = World()
    switch = w.begin()
    w.switches.refused(C, "it cannot", 1.0)
    assert (switch.state, switch.outcome, switch.reason) == (State.FAILED, "refused", "it cannot")
    assert w.fleet[C].serves
    assert w.begin() is not switch, "it may be asked again"


def test_it_is_asked_until_it_says_that_it_drains_and_given_up_in_the_end() -> None:
    w = World()
    switch = w.begin()
    for now in (0.5, 1.5, 2.0, 3.0):
        w.switches.tick(now)
    assert [message for _, message in w.sent] == [SwitchRole(Role.PREFILL, 5.0)] * 3
    w.switches.draining(C)
    w.switches.tick(14.0)
    assert len(w.sent) == 3
    assert not w.over
    w.switches.tick(15.5)
    assert (switch.outcome, w.over) == ("late", [switch])
    assert not w.fleet[C].serves, "it has said that it drains"


def test_one_that_never_heard_of_it_serves_on() -> None:
    w = World()
    switch = w.begin()
    w.away = True
    w.switches.tick(16.0)
    assert (switch.outcome, w.fleet[C].serves) == ("late", True)


@pytest.mark.parametrize("goodbye", [False, True])
def test_a_node_that_dies(goodbye: bool) -> None:
    w = World()
    switch = w.begin()
    if goodbye:
        w.switches.left(C, 1.0)
    w.fleet.remove(C)
    w.switches.died(C, 1.0)
    w.switches.tick(12.0)
    assert switch.outcome == ("late" if goodbye else "died")
    assert w.over == [switch]


def test_a_process_that_comes_back_with_its_old_role() -> None:
    w = World()
    switch = w.begin()
    w.switches.registered(C, Role.DECODE, 1.0)  # the same life, whose connection was lost
    assert str(switch.state) == "draining"
    w.switches.registered(NEXT_C, Role.DECODE, 2.0)
    assert (switch.outcome, switch.return_s) == ("died", None)
    w.switches.registered(NodeId("c", 3), Role.PREFILL, 3.0)
    assert w.over == [switch]


# ---------------------------------------------------------------- with a router


async def ask(harness: Harness, **body: object) -> Answer:
    headers = {"Content-Type": "application/json"}
    url, data = f"{harness.url}/admin/role", json.dumps(body)
    async with harness.session.post(url, data=data, headers=headers) as response:
        return Answer(response.status, dict(response.headers), await response.read())


async def last_switch(harness: Harness) -> dict[str, object]:
    told: list[dict[str, object]] = (await harness.get("/debug/fleet")).json["role_switches"]
    return told[-1]


def again_as(node: StubNode, role: Role, harness: Harness) -> StubNode:
    """The next life of `node`."""
    files, url = tiny_tokenizer.files(), harness.server.control.url
    return StubNode(role, url, MODEL, files, harness.pair._context, name=node.id.name)


def test_a_switch_over_http_moves_what_runs() -> None:
    async def scenario() -> None:
        async with router(endless, step_s=0.02) as harness:
            other = await harness.add_pair(endless, step_s=0.02)
            streams = [
                asyncio.create_task(harness.complete(max_tokens=40, ignore_eos=True))
                for _ in range(6)
            ]
            await eventually(lambda: bool(harness.pair.running) and bool(other.running))
            node = harness.pair.decode
            answer = await ask(harness, node=node.id.name, role="prefill", drain_s=0)
            assert (answer.status, answer.json["state"]) == (202, "draining")
            await eventually(lambda: SwitchRole(Role.PREFILL, 0.0) in node.received)
            node.send(Draining())
            for id in list(harness.pair.running):
                node.send(AttemptFailed(id, "drained", "another role", retryable=True))
            harness.pair.running.clear()
            node.send(Goodbye())
            await eventually(lambda: node.id not in harness.server.control.fleet)
            await node.close()
            successor = again_as(node, Role.PREFILL, harness)
            successor.handle = harness.pair.on_prefill_message
            harness.pair.prefill, first = successor, harness.pair.prefill
            try:
                await eventually(lambda: successor.registered)
                answers = await asyncio.gather(*streams)
                assert {answer.status for answer in answers} == {200}
                assert len({answer.json["choices"][0]["text"] for answer in answers}) == 1
                told = await last_switch(harness)
                assert (told["outcome"], told["from"], told["to"]) == ("done", "decode", "prefill")
                metrics = (await harness.get("/metrics")).body.decode()
                assert 'baton_router_role_switches_total{outcome="done"} 1.0' in metrics
                assert "baton_router_role_switch_seconds_count 1.0" in metrics
            finally:
                await first.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("overtaken", [False, True])
def test_what_reaches_a_leaving_node_too_late_is_no_death(overtaken: bool) -> None:
    """Its goodbye, or the next life's registration, ends attempts of which it never heard."""

    async def scenario() -> None:
        async with router(endless, step_s=0.02) as harness:
            other = await harness.add_pair(endless, step_s=0.02)
            node = harness.pair.decode
            await ask(harness, node=node.id.name, role="prefill", drain_s=0)
            streams = [
                asyncio.create_task(harness.complete(max_tokens=20, ignore_eos=True))
                for _ in range(4)
            ]
            await eventually(lambda: bool(other.running))
            control, asked = harness.server.control, []
            node_lost = control.requests.node_lost

            def listen(node: NodeId, alive: bool = False, cause: str = "node_lost") -> None:
                asked.append(cause)
                node_lost(node, alive, cause)

            control.requests.node_lost = listen  # type: ignore[method-assign]
            if not overtaken:
                node.send(Goodbye())
                await eventually(lambda: bool(asked))
            successor = again_as(node, Role.PREFILL, harness)
            await eventually(lambda: successor.registered)
            assert asked[0] == "drained"
            await node.close()
            assert {answer.status for answer in await asyncio.gather(*streams)} == {200}
            await successor.close()

    asyncio.run(scenario())


def test_what_the_route_refuses() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            only = await ask(harness, node="decode", role="prefill")
            assert (only.status, only.error["code"]) == (409, "role_switch_refused")
            assert "the only decode node" in only.error["message"]
            assert (await ask(harness, node="x", role="prefill")).status == 404
            assert (await ask(harness, node="decode", role="cook")).status == 400
            assert (await ask(harness, node="decode")).status == 400
            body = {"node": "decode", "role": "prefill"}
            assert (await harness.post("/admin/role", body)).status == 415, "as a page could send"
            assert not harness.sent(SwitchRole)

    asyncio.run(scenario())


def test_a_node_that_cannot_switch_says_so() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.add_pair(endless)
            node = harness.pair.decode
            node.handle = lambda message: node.send(SwitchRefused("not this one"))
            await ask(harness, node="decode", role="prefill")
            fleet = harness.server.control.fleet
            await eventually(lambda: fleet[node.id].serves)
            assert (await last_switch(harness))["reason"] == "not this one"

    asyncio.run(scenario())


def test_without_debug_pages_there_is_no_admin() -> None:
    async def scenario() -> None:
        async with router(endless, debug_requests=0) as harness:
            assert (await ask(harness, node="decode", role="prefill")).status == 404
            assert (await harness.get("/debug/fleet")).status == 404

    asyncio.run(scenario())
