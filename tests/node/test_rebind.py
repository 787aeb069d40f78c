"""A reservation that goes on with another prefill node, at every point of a handoff."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.node.pair import ID, PROMPT, SAMPLING, Pair, expected, pair
from wire.request_messages import Abort, Grant, Granted, Rebind, Refused, Reserve
from wire.types import AttemptId, NodeId

LATER = AttemptId(ID.request, 2)
LONG = tuple(i % 20 + 1 for i in range(40))  # more than a step computes
DEAD = NodeId("dead", 1)


def run(scenario: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        async with pair(**settings) as p:
            await scenario(p)

    asyncio.run(body())


def reserve_for_dead(p: Pair, tokens: tuple[int, ...] = LONG) -> Grant:
    """A reservation whose prefill node does nothing any more."""
    p.decode.tell(Reserve(ID, tokens, len(tokens), SAMPLING, DEAD))
    answer = p.decode.link.heard[-1]
    assert isinstance(answer, Granted)
    return answer.grant


def rebind(
    p: Pair, lease: int, output: tuple[int, ...] = (), id: AttemptId = LATER
) -> Granted | Refused:
    p.decode.tell(Rebind(id, lease, p.prefill.shell.me, output))
    answer = p.decode.link.heard[-1]
    assert isinstance(answer, Granted | Refused)
    assert answer.id == id
    return answer


def rebound(p: Pair, lease: int, output: tuple[int, ...] = ()) -> Grant:
    answer = rebind(p, lease, output)
    assert isinstance(answer, Granted), answer
    return answer.grant


def blocks(grant: Grant) -> set[int]:
    return {handle.block_id for handle in grant.handles}


def test_another_prefill_node_goes_on_in_the_same_blocks() -> None:
    async def scenario(p: Pair) -> None:
        old = reserve_for_dead(p)
        new = rebound(p, old.lease)
        assert blocks(new) == blocks(old)
        assert not set(new.handles) & set(old.handles), "new names for new content"
        assert new.capability != old.capability
        assert new.digest_key != old.digest_key
        p.start(new, LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)
        assert p.decode.role.stats.handoffs == {"rebound": 1, "committed": 1}
        assert not p.decode.link.failures(), "the router knows: it asked"

    run(scenario)


@pytest.mark.parametrize("num_steps", range(6))
def test_the_same_node_may_go_on_after_it_failed(num_steps: int) -> None:
    """Units of the failed attempt are under way, or there; none of them counts."""

    async def scenario(p: Pair) -> None:
        grant = p.grant(ID, LONG)
        p.start(grant, ID, LONG)
        for _ in range(num_steps):
            p.prefill.work()
            await asyncio.sleep(0.002 * num_steps)
        p.prefill.role.fail_all("drained", "why")
        answer = rebind(p, grant.lease)
        if isinstance(answer, Refused):
            assert answer.cause == "gone"
            assert num_steps >= 5, "only a commit may come first"
            answer = Granted(LATER, p.grant(LATER, LONG))
        p.start(answer.grant, LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)

    run(scenario, max_num_batched_tokens=8, decode_blocks=40)


def test_a_failed_prefill_node_leaves_the_lease_to_the_router() -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant()
        p.start(grant)
        p.prefill.role.fail_all("drained", "why")
        for _ in range(5):
            p.turn()
            await asyncio.sleep(0.005)
        assert p.decode.role.num_attempts == 1
        assert isinstance(rebind(p, grant.lease), Granted)
        p.decode.tell(Abort(LATER))

    run(scenario)


def test_asked_twice_answered_the_same() -> None:
    async def scenario(p: Pair) -> None:
        old = reserve_for_dead(p)
        new = rebound(p, old.lease)
        assert rebound(p, old.lease) == new
        assert rebound(p, new.lease) == new
        p.start(new, LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)
        answer = rebind(p, old.lease)
        assert isinstance(answer, Refused)

    run(scenario)


def test_tokens_that_the_client_has_extend_the_reservation() -> None:
    """Each token that was logged meanwhile is part of what is computed."""

    async def scenario(p: Pair) -> None:
        tokens = (*PROMPT, 11, 12)
        output = expected(tokens)[0]
        old = reserve_for_dead(p, tokens)
        new = rebound(p, old.lease, (output[0],))
        assert len(new.handles) == len(old.handles) + 1
        p.start(new, LATER, (*tokens, output[0]), num_prompt_tokens=len(tokens))
        assert await p.finish(LATER) == expected(tokens)

    run(scenario)


def test_cached_blocks_stay_and_count() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.finish()
        again = AttemptId("again", 1)
        p.decode.tell(Reserve(again, PROMPT, len(PROMPT), SAMPLING, DEAD))
        old = p.decode.link.heard[-1]
        assert isinstance(old, Granted)
        later = AttemptId("again", 2)
        new = rebind(p, old.grant.lease, id=later)
        assert isinstance(new, Granted)
        assert new.grant.num_cached_tokens == 8
        assert new.grant.handles[:2] == old.grant.handles[:2]
        assert new.grant.handles[2] != old.grant.handles[2]
        p.start(new.grant, later)
        assert await p.finish(later) == expected()

    run(scenario)


def test_blocks_under_transfer_are_replaced_and_quarantined() -> None:
    async def scenario(p: Pair) -> None:
        old = reserve_for_dead(p)
        written = old.handles[3]
        assert p.decode.engine.begin_io(written)
        new = rebound(p, old.lease)
        assert blocks(old) - blocks(new) == {written.block_id}
        assert p.decode.engine.block_counts().quarantined == 1
        p.start(new, LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)
        p.decode.engine.end_io(written)
        assert p.decode.engine.block_counts().quarantined == 0

    run(scenario)


def test_without_room_for_what_is_under_transfer_it_is_refused_and_ended() -> None:
    async def scenario(p: Pair) -> None:
        old = reserve_for_dead(p)
        for handle in old.handles[:2]:
            assert p.decode.engine.begin_io(handle)
        answer = rebind(p, old.lease)
        assert isinstance(answer, Refused)
        assert answer.cause == "capacity"
        assert p.decode.role.num_attempts == 0
        for handle in old.handles[:2]:
            p.decode.engine.end_io(handle)
        p.start(p.grant(LATER, LONG), LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)

    run(scenario, decode_blocks=13)


def test_the_room_is_kept_from_those_who_wait() -> None:
    """A reservation anew would have to queue behind what came meanwhile."""

    async def scenario(p: Pair) -> None:
        old = reserve_for_dead(p)
        other = p.reserve(AttemptId("other", 1), LONG)
        assert isinstance(other, Refused)
        p.start(rebound(p, old.lease), LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)

    run(scenario, decode_blocks=13)


@pytest.mark.parametrize("ending", ["unknown", "aborted", "expired", "draining", "running"])
def test_what_cannot_be_rebound_is_refused_and_ended(ending: str) -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant()
        if ending == "aborted":
            p.decode.tell(Abort(ID))
        elif ending == "expired":
            await asyncio.sleep(0.4)
        elif ending == "draining":
            p.decode.role.drain()
        elif ending == "running":
            p.start(grant)
            await p.until(lambda: p.decode.link.updates())
        answer = rebind(p, grant.lease + (ending == "unknown"))
        assert isinstance(answer, Refused)
        assert answer.cause == ("draining" if ending == "draining" else "gone")
        assert p.decode.role.num_attempts == 0
        assert isinstance(p.reserve(), Refused), "its attempt is over"
        if ending != "draining":
            p.start(p.grant(LATER), LATER)
            assert await p.finish(LATER) == expected()

    run(scenario, lease_ttl_s=0.3 if ending == "expired" else 10.0)
