"""The prefix cache finds what was published, evicts suffixes first, and tells what changed."""

from __future__ import annotations

import random

import pytest

from engine.block_pool import BlockPool, BlockState, Owner
from engine.prefix_cache import CacheChanges, PrefixCache

BLOCK_SIZE = 4
NO_CHANGES = CacheChanges((), ())


def make_cache(
    num_blocks: int = 8, *, enabled: bool = True, max_pending_changes: int = 1000
) -> tuple[BlockPool, PrefixCache]:
    pool = BlockPool(num_blocks, epoch=1)
    cache = PrefixCache(
        pool, BLOCK_SIZE, "model", enabled=enabled, max_pending_changes=max_pending_changes
    )
    return pool, cache


def compute(
    pool: BlockPool, cache: PrefixCache, tokens: list[int]
) -> tuple[list[int], list[bytes]]:
    """A running request's table after computing `tokens`, on top of what is cached."""
    hashes = cache.hashes(tokens, "")
    table = cache.match(hashes)
    pool.acquire(table, Owner.RUNNING)
    table += pool.allocate(-(-len(tokens) // BLOCK_SIZE) - len(table), Owner.RUNNING)
    cache.publish(table, hashes)
    return table, hashes


def test_finds_the_longest_known_prefix() -> None:
    pool, cache = make_cache()
    tokens = list(range(12))
    table, _ = compute(pool, cache, tokens)
    other = cache.hashes([*tokens[:8], 99, 99, 99, 99], "")
    assert cache.match(other) == table[:2]
    assert cache.match(cache.hashes([1, *tokens[1:]], "")) == []


def test_salts_and_models_do_not_meet() -> None:
    pool, cache = make_cache()
    tokens = list(range(8))
    compute(pool, cache, tokens)
    assert cache.match(cache.hashes(tokens, "tenant")) == []
    other_model = PrefixCache(BlockPool(1, epoch=1), BLOCK_SIZE, "another")
    assert set(other_model.hashes(tokens, "")).isdisjoint(cache.hashes(tokens, ""))


def test_extending_hashes_equals_hashing_at_once() -> None:
    _, cache = make_cache()
    tokens = list(range(19))
    hashes = cache.hashes(tokens[:5], "salt")
    cache.extend(hashes, tokens[:11], "salt")
    cache.extend(hashes, tokens, "salt")
    assert hashes == cache.hashes(tokens, "salt")


def test_the_first_publisher_wins_and_the_duplicate_stays_private() -> None:
    pool, cache = make_cache()
    hashes = cache.hashes(list(range(4)), "")
    first, second = pool.allocate(2, Owner.RUNNING)
    cache.publish([first], hashes)
    cache.publish([second], hashes)
    assert cache.match(hashes) == [first]
    cache.release([second], hashes, Owner.RUNNING)
    assert pool.state(second) is BlockState.FREE


def test_evicts_a_suffix_before_its_prefix() -> None:
    pool, cache = make_cache(4)
    table, hashes = compute(pool, cache, list(range(16)))
    cache.release(table, hashes, Owner.RUNNING)
    for remaining in (3, 2, 1, 0):
        pool.allocate(1, Owner.RUNNING)
        assert cache.match(hashes) == table[:remaining]


def test_a_duplicate_refreshes_the_prefix_it_duplicates() -> None:
    pool, cache = make_cache(4)
    tokens = list(range(8))
    hashes = cache.hashes(tokens, "")
    original = pool.allocate(1, Owner.RUNNING)
    cache.publish(original, hashes)
    twin = pool.allocate(2, Owner.RUNNING)
    cache.publish(twin, hashes)  # the first block is a duplicate, the second is news
    cache.release(original, hashes[:1], Owner.RUNNING)
    cache.release(twin, hashes, Owner.RUNNING)
    pool.allocate(3, Owner.RUNNING)
    assert cache.match(hashes) == original, "the suffix went first"


def test_disabled_it_knows_nothing() -> None:
    pool, cache = make_cache(enabled=False)
    table, hashes = compute(pool, cache, list(range(8)))
    assert hashes == []
    cache.release(table, hashes, Owner.RUNNING)
    assert pool.counts().free == pool.num_blocks
    assert cache.take_events() == NO_CHANGES


def test_events_name_what_came_and_went() -> None:
    pool, cache = make_cache(2)
    table, hashes = compute(pool, cache, list(range(8)))
    assert cache.take_events() == CacheChanges(tuple(hashes), ())
    assert not cache.take_events()
    cache.release(table, hashes, Owner.RUNNING)
    pool.allocate(1, Owner.RUNNING)
    assert cache.take_events() == CacheChanges((), (hashes[1],))


def test_removal_is_told_although_addition_was_not() -> None:
    """Somebody may have learned of it by a snapshot in between."""
    pool, cache = make_cache(1)
    table, hashes = compute(pool, cache, list(range(4)))
    assert cache.snapshot() == tuple(hashes)
    cache.release(table, hashes, Owner.RUNNING)
    pool.allocate(1, Owner.RUNNING)
    assert cache.take_events() == CacheChanges((), tuple(hashes))


def test_undrained_events_become_a_snapshot() -> None:
    pool, cache = make_cache(2, max_pending_changes=5)
    for start in range(0, 100, 4):
        table, hashes = compute(pool, cache, list(range(start, start + 4)))
        cache.release(table, hashes, Owner.RUNNING)
    changes = cache.take_events()
    assert changes.snapshot
    assert set(changes.added) == set(cache.snapshot())
    assert cache.take_events() == NO_CHANGES


def apply(known: set[bytes], changes: CacheChanges) -> set[bytes]:
    if changes.snapshot:
        return set(changes.added)
    return (known | set(changes.added)) - set(changes.removed)


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed: int) -> None:
    """Whoever follows the events knows the content, and no suffix outlives its prefix."""
    rng = random.Random(seed)
    pool, cache = make_cache(10, max_pending_changes=rng.choice([3, 1000]))
    running: list[tuple[list[int], list[bytes]]] = []
    seen: list[list[bytes]] = []
    followers: list[set[bytes]] = [set()]
    for _ in range(150):
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 16))]
        if rng.random() < 0.5 and -(-len(tokens) // BLOCK_SIZE) <= pool.num_available:
            hashes = cache.hashes(tokens, "")
            table = pool.allocate(-(-len(tokens) // BLOCK_SIZE), Owner.RUNNING)
            cache.publish(table, hashes)
            running.append((table, hashes))
            seen.append(hashes)
        elif running:
            cache.release(*running.pop(rng.randrange(len(running))), Owner.RUNNING)
        if rng.random() < 0.3:
            changes = cache.take_events()
            followers = [apply(known, changes) for known in followers]
            assert all(known == set(cache.snapshot()) for known in followers)
        if rng.random() < 0.1:
            followers.append(set(cache.snapshot()))
        pool.check_integrity()
        cache.check_integrity()
    for table, hashes in running:
        cache.release(table, hashes, Owner.RUNNING)
    for _ in range(10):
        findable = set(cache.snapshot())
        for hashes in seen:
            assert len(cache.match(hashes)) == len(findable.intersection(hashes))
        pool.allocate(1, Owner.RUNNING)
    assert len(cache) == 0
