"""The block pool's books balance after every operation, and only the right blocks are given out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool, BlockState, Owner
from wire.errors import CapacityError
from wire.types import BlockHandle


def test_allocation_takes_free_blocks_before_cached_ones() -> None:
    pool = BlockPool(3, epoch=1)
    cached = pool.allocate(1, Owner.RUNNING)
    pool.publish({b"a": cached[0]})
    pool.release(cached, Owner.RUNNING)
    taken = pool.allocate(2, Owner.RUNNING)
    assert cached[0] not in taken
    assert pool.counts().cached == 1


def test_eviction_is_least_recently_used_first_and_is_told() -> None:
    pool = BlockPool(3, epoch=1)
    evicted: list[bytes] = []
    pool.on_evict = evicted.extend
    blocks = pool.allocate(3, Owner.RUNNING)
    pool.publish(dict(zip((b"a", b"b", b"c"), blocks, strict=True)))
    pool.release(blocks, Owner.RUNNING)
    pool.touch(blocks[0])
    assert pool.allocate(2, Owner.RUNNING) == [blocks[1], blocks[2]]
    assert evicted == [b"b", b"c"]


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(3, epoch=1)
    pool.allocate(1, Owner.RUNNING)
    before = pool.counts()
    with pytest.raises(CapacityError):
        pool.allocate(3, Owner.RUNNING)
    assert pool.counts() == before


def test_a_handle_names_the_content_not_the_place() -> None:
    pool = BlockPool(1, epoch=7)
    [block_id] = pool.allocate(1, Owner.LEASED)
    first = pool.handle(block_id)
    assert pool.is_current(first)
    pool.release([block_id], Owner.LEASED)
    assert not pool.is_current(first), "the content was given up"
    pool.allocate(1, Owner.RUNNING)
    second = pool.handle(block_id)
    assert second.generation > first.generation
    assert not pool.is_current(first)
    assert pool.is_current(second)
    assert not pool.is_current(replace(second, epoch=8)), "another process's block"
    assert not pool.is_current(replace(second, block_id=1)), "no such block"


def test_a_cached_block_keeps_its_name() -> None:
    pool = BlockPool(1, epoch=7)
    [block_id] = pool.allocate(1, Owner.RUNNING)
    handle = pool.handle(block_id)
    pool.publish({b"a": block_id})
    pool.release([block_id], Owner.RUNNING)
    assert pool.is_current(handle)
    assert not pool.begin_io(handle), "nobody holds it, it may be evicted any time"
    pool.acquire([block_id], Owner.RUNNING)
    assert pool.begin_io(handle)


def test_quarantine_ends_with_the_last_transfer() -> None:
    pool = BlockPool(1, epoch=1)
    [block_id] = pool.allocate(1, Owner.LEASED)
    handle = pool.handle(block_id)
    assert pool.begin_io(handle)
    assert pool.begin_io(handle)
    pool.release([block_id], Owner.LEASED)
    assert pool.state(block_id) is BlockState.QUARANTINED
    assert not pool.begin_io(handle), "the right has ended"
    assert pool.num_available == 0
    pool.end_io(block_id)
    with pytest.raises(CapacityError):
        pool.allocate(1, Owner.RUNNING)
    pool.end_io(block_id)
    assert pool.state(block_id) is BlockState.FREE


def test_a_published_block_leaves_quarantine_for_the_cache() -> None:
    pool = BlockPool(1, epoch=1)
    [block_id] = pool.allocate(1, Owner.RUNNING)
    pool.publish({b"a": block_id})
    pool.begin_io(pool.handle(block_id))
    pool.release([block_id], Owner.RUNNING)
    assert pool.state(block_id) is BlockState.QUARANTINED
    pool.end_io(block_id)
    assert pool.state(block_id) is BlockState.CACHED


def test_misuse_is_noticed() -> None:
    pool = BlockPool(2, epoch=1)
    [block_id] = pool.allocate(1, Owner.RUNNING)
    with pytest.raises(AssertionError, match="no transfer"):
        pool.end_io(block_id)
    with pytest.raises(AssertionError, match="no content"):
        pool.acquire([1 - block_id], Owner.RUNNING)
    with pytest.raises(AssertionError, match="by nobody"):
        pool.publish({b"a": 1 - block_id})
    with pytest.raises(AssertionError, match="too often"):
        pool.release([block_id], Owner.LEASED)


def test_check_integrity_notices_a_leak() -> None:
    pool = BlockPool(2, epoch=1)
    pool._free.pop()
    with pytest.raises(AssertionError, match="incomplete"):
        pool.check_integrity()


class PoolWalk(RuleBasedStateMachine):
    """Any order of operations, against a model that only counts."""

    owners = st.sampled_from(Owner)
    pick = st.integers(0, 1 << 30)

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(5, epoch=3)
        self.pool.on_evict = self.forget
        self.held: list[tuple[int, Owner]] = []
        self.io: list[BlockHandle] = []
        self.published: dict[bytes, int] = {}
        self.generations = [0] * 5
        self.num_published = 0

    def forget(self, content_hashes: Sequence[bytes]) -> None:
        evicted = [self.published.pop(content_hash) for content_hash in content_hashes]
        assert all(held not in evicted for held, _ in self.held), "a held block was evicted"

    @rule(count=st.integers(0, 3), owner=owners)
    def allocate(self, count: int, owner: Owner) -> None:
        touched = {b for b, _ in self.held} | {h.block_id for h in self.io}
        if count > 5 - len(touched):
            with pytest.raises(CapacityError):
                self.pool.allocate(count, owner)
            return
        for block_id in self.pool.allocate(count, owner):
            assert block_id not in touched, "a block in use was given out"
            generation = self.pool.handle(block_id).generation
            assert generation > self.generations[block_id]
            self.generations[block_id] = generation
            self.held.append((block_id, owner))

    @precondition(lambda self: self.held)
    @rule(pick=pick)
    def release(self, pick: int) -> None:
        block_id, owner = self.held.pop(pick % len(self.held))
        self.pool.release([block_id], owner)

    @precondition(lambda self: self.held)
    @rule(pick=pick, owner=owners)
    def hand_over(self, pick: int, owner: Owner) -> None:
        block_id, old = self.held.pop(pick % len(self.held))
        self.pool.hand_over([block_id], old, owner)
        self.held.append((block_id, owner))

    @precondition(lambda self: self.held)
    @rule(pick=pick)
    def publish(self, pick: int) -> None:
        block_id, _ = self.held[pick % len(self.held)]
        if block_id in self.published.values():
            return
        self.num_published += 1
        name = str(self.num_published).encode()
        self.pool.publish({name: block_id})
        self.published[name] = block_id

    @precondition(lambda self: self.published)
    @rule(pick=pick, owner=owners)
    def acquire(self, pick: int, owner: Owner) -> None:
        block_id = list(self.published.values())[pick % len(self.published)]
        self.pool.acquire([block_id], owner)
        self.held.append((block_id, owner))

    @rule(block_id=st.integers(0, 4), age=st.integers(0, 1))
    def begin_io(self, block_id: int, age: int) -> None:
        handle = BlockHandle(3, block_id, max(0, self.generations[block_id] - age))
        entitled = age == 0 and any(block_id == held for held, _ in self.held)
        assert self.pool.begin_io(handle) is entitled
        if entitled:
            self.io.append(handle)

    @precondition(lambda self: self.io)
    @rule(pick=pick)
    def end_io(self, pick: int) -> None:
        handle = self.io.pop(pick % len(self.io))
        assert self.pool.handle(handle.block_id) == handle, "reused under a transfer"
        self.pool.end_io(handle.block_id)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        counts = self.pool.counts()
        assert counts.balanced
        running = {b for b, owner in self.held if owner is Owner.RUNNING}
        leased = {b for b, _ in self.held} - running
        assert (counts.running, counts.leased) == (len(running), len(leased))
        assert counts.quarantined == len({h.block_id for h in self.io} - running - leased)


PoolWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolWalk = PoolWalk.TestCase
