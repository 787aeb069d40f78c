"""What nodes tell about where the time went."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.attempt_clock import AttemptClock
from telemetry.metrics import HANDOFFS_OPEN, LEASES
from tests.node.pair import ID, PROMPT, pair
from wire.request_messages import PrefillTiming, Resend

SECONDS = st.floats(0, 1000)


def test_an_attempt_that_waits_for_another_ones_step() -> None:
    clock = AttemptClock(heard=10.0)
    clock.step_over(now=13.0, seconds=1.0)
    clock.step_over(now=15.0, seconds=1.5)
    assert clock.timing() == PrefillTiming(queue_s=2.0, compute_s=3.0, num_steps=2)


@given(heard=SECONDS, steps=st.lists(st.tuples(SECONDS, SECONDS), max_size=4))
def test_durations_are_never_negative_nor_longer_than_the_time(
    heard: float, steps: list[tuple[float, float]]
) -> None:
    clock, now = AttemptClock(heard), heard
    for since, seconds in steps:
        now += since
        clock.step_over(now, seconds)
    timing = clock.timing()
    assert timing.queue_s >= 0
    assert timing.compute_s >= 0
    assert timing.num_steps == len(steps)
    assert timing.queue_s + timing.compute_s <= (now - heard) * (1 + 1e-9) + 1e-9


def test_the_first_token_says_where_its_time_went_and_says_it_again() -> None:
    async def scenario() -> None:
        async with pair(max_num_batched_tokens=4) as p:
            p.start(p.grant())
            for _ in range(3):
                assert p.prefill.work()
            (update,) = p.prefill.link.updates()
            assert update.timing is not None
            assert update.timing.num_steps == -(-len(PROMPT) // 4)
            p.prefill.tell(Resend(ID, 0))
            assert p.prefill.link.updates() == [update, update]
            await p.finish()
            assert all(u.timing is None for u in p.decode.link.updates())

    asyncio.run(scenario())


def test_transfers_under_way_are_known_by_state() -> None:
    async def scenario() -> None:
        async with pair() as p:
            grant = p.grant()
            assert p.decode.role.open_transfers == {
                LEASES: {"granted": 1, "receiving": 0, "committing": 0}
            }
            p.start(grant)
            assert p.prefill.role.open_transfers[HANDOFFS_OPEN]["computing"] == 1
            await p.finish()
            await p.until(lambda: not any(p.prefill.role.open_transfers[HANDOFFS_OPEN].values()))
            assert not any(p.decode.role.open_transfers[LEASES].values())
            assert p.prefill.role.stats.handoffs == p.decode.role.stats.handoffs == {"committed": 1}

    asyncio.run(scenario())


def test_the_first_token_leaves_before_what_is_left_is_sealed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with pair() as p:
            sender = p.prefill.role._sender
            seal, told = sender.blocks_finished, []

            def watched(*args: Any) -> None:
                told.append(len(p.prefill.link.updates()))
                seal(*args)

            monkeypatch.setattr(sender, "blocks_finished", watched)
            p.start(p.grant())
            await p.finish()
            assert told[-1] == 1

    asyncio.run(scenario())
