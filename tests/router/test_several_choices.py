"""Choices of one request: they follow the first to its nodes, keep its place, and wait for room."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from router.admission import Admission
from router.dispatch import Dispatch
from router.effects import NeedsCapacity
from router.fleet import Fleet
from router.policy import Candidate, Wishes, choose_decode, choose_prefill
from router.work import Prompt, Work
from tests.router.fleets import candidate, chooser_of, id_of, register
from tests.router.harness import endless, eventually, router
from tests.router.scripted_nodes import D1, D2, LIMITS, P1, P2, Nodes, grant, start
from wire.request_messages import Granted, Refused, Reserve, TokenUpdate
from wire.types import NodeId, Role, SamplingParams

WORK = Work("r", Prompt(tuple(range(40))), SamplingParams(max_tokens=8))


@dataclass
class Listening(Nodes):
    """Remembers which nodes were called near."""

    near: list[set[NodeId]] = field(default_factory=list)

    def pick_prefill(
        self, work: Work, wishes: Wishes, decode: NodeId | None = None
    ) -> NodeId | None:
        self.near.append(set(wishes.near))
        return super().pick_prefill(work, wishes, decode)


def decoding_on(prefill: NodeId, decode: NodeId) -> Dispatch:
    first = start(Nodes([prefill], [decode]))
    first.place(0)
    first.granted(decode, Granted(first.id, grant(decode)), 0)
    first.tokens(decode, TokenUpdate(first.id, 0, (50,)), 0)
    return first


def test_a_follower_wishes_to_be_where_the_first_is() -> None:
    nodes = Listening()
    follower = start(nodes)
    follower.place(0)
    other = start(nodes)
    other.follow(decoding_on(P2, D2))
    other.place(0)
    assert nodes.near == [set(), {P2, D2}]


def test_a_follower_waits_for_room_as_long_as_a_request_may_take() -> None:
    follower = start()
    follower.follow(decoding_on(P1, D1))
    follower.enter_queue(0)
    for now in (0.0, LIMITS.queue_s + 1, LIMITS.request_s - 1):
        follower.place(now)
        for node in (D1, D2):
            effects = follower.refused(node, Refused(follower.id, "capacity", "full"), now)
        assert any(isinstance(effect, NeedsCapacity) for effect in effects)
        assert follower.tick(now) == []
    assert follower.tick(LIMITS.request_s + 1) != []


def near(node: Candidate) -> Candidate:
    return replace(node, near=True)


def test_shared_blocks_outweigh_an_emptier_node_but_not_a_lack_of_room() -> None:
    busy, idle = candidate(D1, free=40), candidate(D2, free=90)
    assert id_of(choose_decode([busy, idle], 100)) == D2
    assert id_of(choose_decode([near(busy), idle], 100)) == D1
    full = near(replace(busy, load=candidate(D1, free=3).load))
    assert id_of(choose_decode([full, idle], 100)) == D2


def test_the_near_prefill_node_counts_as_having_the_prompt_before_its_events_come() -> None:
    fleet = Fleet(node_timeout_s=3, node_stall_s=60)
    for node, role in ((P1, Role.PREFILL), (P2, Role.PREFILL), (D1, Role.DECODE)):
        fleet.register(node, register(role), 0)
    fleet.assign(P2, "another", 20, 0)
    chooser = chooser_of(fleet)
    assert chooser.pick_prefill(WORK, Wishes()) == P1
    assert chooser.pick_prefill(WORK, Wishes(near={P2, D1})) == P2
    fleet.assign(P2, "a long one", 200, 0)
    assert chooser.pick_prefill(WORK, Wishes(near={P2, D1})) == P1
    assert id_of(choose_prefill([], 1)) is None


def test_who_enters_later_keeps_the_place_of_its_arrival() -> None:
    queue: Admission[str] = Admission(max_active=1, max_waiting=9)
    queue.enter("running")
    arrival = queue.new_arrival()
    queue.enter("later")
    queue.enter("follower a", arrival=arrival)
    queue.enter("follower b", arrival=arrival)
    queue.leave("running")
    order = []
    while (key := queue.next(0.0)) is not None:
        order.append(key)
        queue.leave(key)
    assert order == ["follower a", "follower b", "later"]


def test_all_choices_go_to_one_pair_of_nodes() -> None:
    async def scenario() -> None:
        async with router(endless, max_streams=8) as harness:
            await harness.add_pair(endless)
            answer = await harness.complete(n=6, max_tokens=5, prompt="x" * 100)
            assert len(answer.json["choices"]) == 6
            asked = [
                [m for m in p.decode.received if isinstance(m, Reserve)] for p in harness.pairs
            ]
            assert sorted(len(messages) for messages in asked) == [0, 6]
            assert len({m.prefill for messages in asked for m in messages}) == 1

    asyncio.run(scenario())


def test_followers_are_ahead_of_who_came_after_their_request() -> None:
    async def scenario() -> None:
        async with router(endless, max_streams=1) as harness:
            requests = harness.server.control.requests
            several = asyncio.create_task(harness.complete(n=3, max_tokens=40, prompt="many"))
            await eventually(lambda: len(harness.sent(Reserve)) == 1)
            late = asyncio.create_task(harness.complete(prompt="late", max_tokens=2))
            await eventually(lambda: requests.num_waiting > 0)
            for task in (several, late):
                assert (await task).status == 200
            lengths = [len(message.tokens) for message in harness.sent(Reserve)]
            assert lengths == [*[lengths[0]] * 3, lengths[-1]]

    asyncio.run(scenario())
