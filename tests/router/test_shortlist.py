"""A choice among a fleet's shortlist is the choice among all of its nodes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router import node_chooser, shortlist
from router.breaker import Pair
from router.fleet import Fleet
from router.policy import Wishes
from router.work import Prompt, Work
from tests.router.fleets import chooser_of
from tests.router.harness import MODEL
from wire.fleet_messages import CacheEvents, Register
from wire.layout import KVLayout
from wire.types import NodeId, NodeLoad, Role, SamplingParams

LAYOUT = KVLayout(2, 2, 16, 4, "float32")
PROMPT = Prompt(tuple(range(16)))
WORK = Work("new", PROMPT, SamplingParams(max_tokens=20))
HASHES = PROMPT.block_hashes(MODEL.fingerprint, 4)

NODE = st.tuples(
    st.integers(0, 30),  # queued tokens
    st.integers(0, 40),  # free blocks
    st.integers(0, 4),  # blocks of the prompt in its cache
    st.lists(st.integers(0, 30), max_size=2),  # assigned
    st.sampled_from(("", "other")),  # numerics
    st.sampled_from((40, 80)),  # blocks in all
    st.sampled_from((True, True, True, False)),  # serves
)


def fleet_of(nodes: list[tuple[Role, int, int, int, list[int], str, int, bool]]) -> Fleet:
    fleet = Fleet(10, 10)
    for number, (role, queued, free, cached, assigned, numerics, total, serves) in enumerate(nodes):
        node = NodeId(f"{role.value}-{number}", 1)
        model = replace(MODEL, numerics=numerics)
        fleet.register(node, Register(role, model, LAYOUT, 80, "-", (), "-"), 0.0)
        load = NodeLoad(queued_tokens=queued, blocks_total=total, blocks_free=free)
        fleet.heartbeat(node, load, 0.0)
        fleet[node].cache.apply(CacheEvents(1, (*HASHES[:cached], b"x" * 16), (), True))
        for index, tokens in enumerate(assigned):
            fleet.assign(node, f"{number}-{index}", tokens, tokens % 3)
        if not serves:
            fleet.drain(node)
    return fleet


def chosen(fleet: Fleet, wishes: Wishes, refused: Collection[NodeId]) -> object:
    chooser = chooser_of(fleet)
    ways = chooser._ways(WORK, wishes, refused)
    for_others = [chooser.pick_prefill(WORK, wishes, node.id) for node in fleet]
    return ways, chooser.pick_prefill(WORK, wishes), for_others


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(Role), NODE).map(lambda n: (n[0], *n[1])), max_size=14),
    st.data(),
)
def test_the_shortlist_holds_the_best(
    nodes: list[tuple[Role, int, int, int, list[int], str, int, bool]], data: st.DataObject
) -> None:
    fleet = fleet_of(nodes)
    ids = [node.id for node in fleet]
    some = st.lists(st.sampled_from(ids), max_size=3) if ids else st.just([])
    wishes = Wishes(
        avoid=data.draw(some),
        avoid_pairs={Pair(*pair) for pair in zip(data.draw(some), data.draw(some), strict=False)},
        numerics=data.draw(st.sampled_from(("", "other"))),
        now=1.0,
        near=data.draw(some),
    )
    for pair in zip(data.draw(some), data.draw(some), strict=False):
        for _ in range(3):
            fleet.breaker.failed(Pair(*pair), 1.0)
    refused = data.draw(some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shortlist, "FEW", 0)
        short = chosen(fleet, wishes, refused)
        patch.setattr(node_chooser, "shortlist", lambda kind, alike, *_: alike)
        assert short == chosen(fleet, wishes, refused)


def test_most_of_many_need_no_look() -> None:
    fleet = fleet_of([(Role.PREFILL, 0, 30, 0, [], "", 80, True)] * 50)
    nodes = list(fleet)
    kind = nodes[0].kind
    fleet[nodes[7].id].cache.apply(CacheEvents(2, tuple(HASHES[:2]), ()))
    assert shortlist.shortlist(kind, nodes, WORK, ()) == [nodes[7], nodes[0]]
    assert shortlist.shortlist(kind, nodes, WORK, {nodes[9].id}) == [nodes[7], nodes[9], nodes[0]]
    fleet.assign(nodes[0].id, "one", 1, 0)
    assert shortlist.shortlist(kind, nodes, WORK, ()) == [nodes[7], nodes[1]]


def test_who_answers_may_be_the_roomiest_or_the_first_with_room() -> None:
    def mixed(queued: int, free: int) -> tuple[Role, int, int, int, list[int], str, int, bool]:
        return Role.MIXED, queued, free, 0, [], "", 80, True

    nodes = list(fleet_of([mixed(0, 1)] * 10 + [mixed(5, 30)] * 10 + [mixed(9, 60)] * 10))
    found = shortlist.shortlist(nodes[0].kind, nodes, WORK, ())
    assert {node.id.name for node in found} == {"mixed-20", "mixed-10"}


def test_assignments_are_counted_once() -> None:
    fleet = fleet_of([(Role.PREFILL, 0, 30, 0, [5], "", 80, True)])
    (node,) = fleet
    fleet.assign(node.id, "0-0", 3, 0)
    assert (node.pending_tokens, node.queue[:2]) == (3, (3, 1))
    fleet.unassign(node.id, "0-0")
    fleet.unassign(node.id, "0-0")
    assert (node.pending_tokens, node.queue[:2]) == (0, (0, 0))
