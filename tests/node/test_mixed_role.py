"""A mixed node between a prefill node and a decode node: three kinds of work on one engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest

from decode_node.role import DecodeRole
from node.mixed_role import MixedRole
from node.router_link import RouterLink
from node.shell import NodeShell
from prefill_node.role import PrefillRole
from telemetry.metrics import HANDOFFS_OPEN, LEASES
from tests.node.pair import PROMPT, SAMPLING, FakeLink, FakeShell, Node, Pair, build, expected, pair
from tests.node.test_roles import LONG
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    Generate,
    Grant,
    Granted,
    Prefill,
    Refused,
    Resend,
    Reserve,
)
from wire.types import AttemptId, Role

TO_IT, FROM_IT, ALONE = (AttemptId(name, 1) for name in ("to it", "from it", "alone"))


def both_roles(shell: NodeShell) -> MixedRole:
    return MixedRole(PrefillRole(shell), DecodeRole(shell))


class Trio:
    """A pair, and a mixed node that takes from its one and sends to its other node."""

    def __init__(self, p: Pair, mixed: Node[MixedRole]) -> None:
        self.pair = p
        self.mixed = mixed

    @property
    def answering(self) -> dict[AttemptId, FakeLink]:
        """Who answers which request, as its router hears it."""
        mixed, decode = self.mixed.link, self.pair.decode.link
        return {TO_IT: mixed, FROM_IT: decode, ALONE: mixed}

    def start_all(self, tokens: tuple[int, ...] = PROMPT) -> None:
        """One request of each kind, as a router begins them."""
        prefill, decode, mixed = self.pair.prefill, self.pair.decode, self.mixed
        self._hand_over(TO_IT, prefill, mixed, tokens)
        self._hand_over(FROM_IT, mixed, decode, tokens)
        mixed.tell(Generate(ALONE, tokens, len(tokens), SAMPLING))

    def _hand_over(
        self,
        id: AttemptId,
        sender: Node[PrefillRole] | Node[MixedRole],
        receiver: Node[DecodeRole] | Node[MixedRole],
        tokens: tuple[int, ...],
    ) -> None:
        receiver.tell(Reserve(id, tokens, len(tokens), SAMPLING, sender.shell.me))
        answer = receiver.link.heard[-1]
        assert isinstance(answer, Granted), answer
        self.start(id, sender, answer.grant, tokens)

    def start(
        self,
        id: AttemptId,
        sender: Node[PrefillRole] | Node[MixedRole],
        grant: Grant | None,
        tokens: tuple[int, ...],
    ) -> None:
        sender.tell(Prefill(id, tokens, len(tokens), SAMPLING, grant))

    def everybody(self, message: Message) -> None:
        self.pair.both(message)
        self.mixed.tell(message)

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self.pair.turn()
                self.mixed.work()
                self.mixed.role.tick()
                await asyncio.sleep(0.001)


@asynccontextmanager
async def trio() -> AsyncIterator[Trio]:
    """All books must balance at the end."""
    async with pair(decode_blocks=64, prefill_blocks=64, max_num_batched_tokens=8) as p:
        shell = p.prefill.shell
        built = build(shell.config, 64, 64)
        made = Trio(p, Node(both_roles, FakeShell("mixed", shell.context, built)))
        try:
            yield made
            await made.until(lambda: made.mixed.balanced)
            made.mixed.check_balance()
            assert made.mixed.role.num_attempts == 0
        finally:
            made.mixed.close()


@pytest.mark.parametrize("tokens", [PROMPT, LONG])
def test_it_takes_hands_over_and_serves_alone_in_the_same_steps(tokens: tuple[int, ...]) -> None:
    async def scenario() -> None:
        async with trio() as t:
            t.start_all(tokens)
            open_transfers = t.mixed.role.open_transfers
            assert open_transfers[LEASES]["granted"] == 1
            assert open_transfers[HANDOFFS_OPEN]["computing"] == 1
            assert t.mixed.role.num_attempts == 3
            await t.until(lambda: all(link.output(id)[1] for id, link in t.answering.items()))
            for id, link in t.answering.items():
                assert link.output(id) == expected(tokens)
                t.everybody(Ack(id))
            assert not any(t.mixed.role.knows(id) for id in (TO_IT, ALONE))

    asyncio.run(scenario())


def test_what_got_lost_is_repeated_by_the_half_that_knows_it() -> None:
    async def scenario() -> None:
        async with trio() as t:
            t.start_all(LONG)
            heard = t.mixed.link.heard
            t.mixed.tell(Resend(FROM_IT, 0))  # it computes the prompt, and has no token yet
            t.mixed.tell(Resend(ALONE, 0))
            t.mixed.tell(Resend(AttemptId("nobody's", 1), 0))
            assert [f.id.request for f in t.mixed.link.failures(AttemptId("nobody's", 1))] == [
                "nobody's"
            ]
            assert not t.mixed.link.failures(FROM_IT)
            assert not t.mixed.link.failures(ALONE)
            assert len(heard) >= 4
            for id in (TO_IT, FROM_IT, ALONE):
                t.everybody(Abort(id))

    asyncio.run(scenario())


@pytest.mark.parametrize("end", ["abort", "drained", "a failed step", "its router is lost"])
def test_endings_from_outside_leave_nothing(end: str) -> None:
    async def scenario() -> None:
        async with trio() as t:
            t.start_all(LONG)
            for _ in range(2):
                t.mixed.work()
            role, link = t.mixed.role, t.mixed.link
            if end == "drained":
                role.fail_all("drained", "the node is shutting down")
            elif end == "a failed step":
                role.fail([str(FROM_IT), str(ALONE)], "internal", "boom")
                assert {f.cause for f in link.failures(ALONE)} == {"internal"}
                assert {f.cause for f in link.failures(FROM_IT)} == {"internal"}
                assert role.num_attempts == 1
            elif end == "its router is lost":
                role.router_lost(cast(RouterLink, link))
            for id in (TO_IT, FROM_IT, ALONE):
                t.everybody(Abort(id))
            assert role.num_attempts == 0

    asyncio.run(scenario())


def test_draining_takes_nothing_new_of_any_kind() -> None:
    async def scenario() -> None:
        async with trio() as t:
            t.mixed.role.drain()
            t.mixed.tell(Generate(ALONE, PROMPT, len(PROMPT), SAMPLING))
            t.mixed.tell(Reserve(TO_IT, PROMPT, len(PROMPT), SAMPLING, t.pair.prefill.shell.me))
            refused = [m.cause for m in t.mixed.link.heard if isinstance(m, Refused)]
            assert refused == ["draining", "draining"]
            t.start(FROM_IT, t.mixed, None, PROMPT)
            assert [f.cause for f in t.mixed.link.failures(FROM_IT)] == ["drained"]

    asyncio.run(scenario())


def test_what_it_tells_the_fleet() -> None:
    async def scenario() -> None:
        async with trio() as t:
            role = t.mixed.role
            assert role.name is Role.MIXED
            assert {address.transport for address in role.transports} == {"shm", "zmq"}
            assert role.stats is t.mixed.shell.transfers

    asyncio.run(scenario())
