"""A prefill node's links to decode nodes: who may say what on them."""

from __future__ import annotations

import asyncio

import pytest
import zmq

from prefill_node.peers import PeerLinks
from wire.fleet_messages import Gone
from wire.handoff_messages import Committed, RenewLeases
from wire.layout import KVLayout
from wire.messages import Message
from wire.request_messages import Grant
from wire.sockets import Hub
from wire.types import AttemptId, NodeId

ME = NodeId("prefill", 1)
DECODE, OTHER = NodeId("decode", 1), NodeId("other", 1)
DONE = Committed(AttemptId("r", 1), 7)


def grant_of(decode: NodeId, url: str) -> Grant:
    layout = KVLayout(1, 1, 1, 1, "float32")
    return Grant(1, bytes(16), bytes(16), decode, url, (), layout, (), 0, 1.0)


@pytest.mark.parametrize(
    ("speaker", "message", "heard"),
    [
        (DECODE, DONE, True),
        (OTHER, DONE, False),
        (NodeId("decode", 2), DONE, False),
        (NodeId("decode", 2), Gone(DECODE), True),
        (OTHER, Gone(OTHER), False),
    ],
)
def test_who_is_heard_on_the_link_to_a_decode_node(
    speaker: NodeId, message: Message, heard: bool
) -> None:
    async def body() -> None:
        context = zmq.Context[zmq.Socket[bytes]]()
        arrived: list[tuple[NodeId, Message]] = []
        asked = asyncio.Event()
        own = Hub(DECODE, "tcp://127.0.0.1:*", lambda _: asked.set(), context)
        links = PeerLinks(ME, lambda sender, m: arrived.append((sender, m)), context)
        try:
            links.send(grant_of(DECODE, own.url), RenewLeases(()))
            async with asyncio.timeout(20):
                await asked.wait()
            own._inbox.me = speaker  # somebody else has its address, or it lies
            own.send(ME, message)
            own._inbox.me = DECODE
            own.send(ME, DONE)
            async with asyncio.timeout(20):
                while (DECODE, DONE) not in arrived:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            expected = [(speaker, message)] if heard and speaker != DECODE else []
            assert arrived[: len(expected)] == expected
            assert ((speaker, message) in arrived) is heard
        finally:
            links.close()
            own.close()
            context.destroy(0)

    asyncio.run(body())
