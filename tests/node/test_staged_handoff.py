"""Blocks that travel through staging memory, as those of a device do, arrive as they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from engine.staging import FreeRanges, Staging
from engine.unit_copies import UnitCopies, at_once
from node.staged_memory import StagedMemory
from telemetry import metrics as names
from tests.node.pair import ID, LAYOUT, Pair, expected, pair
from wire.types import AttemptId, SamplingParams

LONG = tuple(1 + i % 20 for i in range(38))  # nine full blocks and a half
SAMPLING = SamplingParams(seed=5, max_tokens=6, ignore_eos=True)


@asynccontextmanager
async def staged(**settings: Any) -> AsyncIterator[Pair]:
    """A pair whose staging memory is all free at the end."""
    settings = {"staging_blocks": 8, "max_num_batched_tokens": 16, **settings}
    async with pair(**settings) as made:
        yield made
        await made.settle()
        for node in (made.prefill, made.decode):
            memory = node.shell.built.memory
            assert isinstance(memory, StagedMemory)
            assert memory.staging.num_free == memory.staging.num_bytes


@pytest.mark.parametrize("transport", ["cuda-ipc", "shm", "zmq"])
@pytest.mark.parametrize("staging_blocks", [2, 8])
def test_a_handoff_through_staging_memory(transport: str, staging_blocks: int) -> None:
    async def scenario() -> None:
        async with staged(transport=transport, staging_blocks=staging_blocks) as p:
            p.start(p.grant(tokens=LONG), tokens=LONG)
            assert await p.finish() == expected(LONG)
            stats = p.prefill.role.stats
            assert stats.transport_failures == {}
            by_transport = stats.histograms[names.TRANSFER_BYTES]
            assert by_transport.keys() == {transport}

    asyncio.run(scenario())


@pytest.mark.parametrize("transport", ["cuda-ipc", "shm", "zmq"])
def test_several_handoffs_share_it(transport: str) -> None:
    async def scenario() -> None:
        async with staged(transport=transport, decode_blocks=64, prefill_blocks=64) as p:
            prompts = {AttemptId(f"r{n}", 1): LONG[n:] for n in range(4)}
            for id, tokens in prompts.items():
                p.start(p.grant(id, tokens=tokens), id, tokens=tokens)
            for id, tokens in prompts.items():
                assert await p.finish(id) == expected(tokens)

    asyncio.run(scenario())


def test_no_more_leaves_at_one_time_than_there_is_memory_for() -> None:
    """The decode node does not read; what is on the way stays below half of the memory."""

    async def scenario() -> None:
        async with staged(transport="shm", staging_blocks=4, when_over=at_once) as p:
            p.start(p.grant(tokens=LONG), tokens=LONG)
            pump = p.prefill.role._sender._pump
            for _ in range(4):
                p.prefill.work()
                assert 0 <= pump._sending_bytes <= 2 * LAYOUT.block_bytes
            assert pump._held_back
            assert await p.finish() == expected(LONG)

    asyncio.run(scenario())


def test_bytes_that_do_not_reach_the_device_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the tests above see what does not arrive."""
    write = UnitCopies.write

    def into_nothing(copies: UnitCopies, *args: Any, **more: Any) -> None:
        before = copies._store.blocks.clone()
        write(copies, *args, **more)
        copies._store.blocks.copy_(before)

    monkeypatch.setattr(UnitCopies, "write", into_nothing)

    async def scenario() -> None:
        async with pair(staging_blocks=8) as p:
            p.start(p.grant())
            with pytest.raises(AssertionError, match=r"layers of block|reads a wrong slot"):
                await p.finish()
            for node in (p.prefill, p.decode):
                node.role.fail_all("internal", "the test is over")
                node.engine.abort(str(ID))

    asyncio.run(scenario())


def test_a_region_is_free_when_the_last_view_is_let_go_of() -> None:
    staging = Staging(200, pinned=False)
    first = staging.room(100)
    part = first[3:5]
    second = staging.region(100)
    assert staging.num_free == 0
    assert staging.region(8) is None
    overflow = staging.room(8)
    assert len(overflow) == 8
    assert (staging.num_free, staging.num_plain) == (0, 1), "it lies in plain memory"
    del first
    assert staging.num_free == 0, "a part of it is still held"
    del part
    assert staging.num_free == 100
    del second
    assert staging.num_free == 200


def test_free_ranges_join_their_neighbours() -> None:
    ranges = FreeRanges(100)
    starts = [ranges.take(25) for _ in range(4)]
    assert starts == [0, 25, 50, 75]
    assert ranges.take(1) is None
    ranges.give_back(25, 50)
    ranges.give_back(75, 100)
    assert ranges.take(30) is None, "no piece is long enough"
    ranges.give_back(50, 75)
    assert ranges.take(75) == 25
    ranges.give_back(0, 25)
    ranges.give_back(25, 100)
    assert ranges.take(100) == 0
    assert ranges.num_free == 0
