"""What is kept of responses: found by its owner, expired, evicted, shared by processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from router.responses.sqlite_store import MAX_CHAIN, SqliteStore, StoreLimits
from router.responses.store import ChainTooLong, NotStored, StoredResponse, StoreFailed
from wire.errors import ConfigError

LIMITS = StoreLimits(ttl_s=100.0, max_bytes=10_000, max_chain_bytes=5_000)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def response(
    id: str, previous: str | None = None, size: int = 0, owner: str = "me"
) -> StoredResponse:
    return StoredResponse(id, owner, previous, {"id": id, "text": "x" * size}, [{"id": f"in-{id}"}])


Scenario = Callable[[SqliteStore, Clock], Awaitable[None]]


def run(scenario: Scenario, path: Path | None = None, limits: StoreLimits = LIMITS) -> None:
    async def start() -> None:
        clock = Clock()
        store = SqliteStore(path, limits, clock)
        try:
            await scenario(store, clock)
        finally:
            await store.close()

    asyncio.run(start())


async def ids(store: SqliteStore, id: str) -> list[str]:
    return [stored.id for stored in await store.chain(id, "me")]


async def has(store: SqliteStore, id: str, owner: str = "me") -> bool:
    try:
        return (await store.get(id, owner)).id == id
    except NotStored:
        return False


@pytest.mark.parametrize("in_file", [False, True])
def test_kept_and_forgotten(in_file: bool, tmp_path: Path) -> None:
    async def scenario(store: SqliteStore, clock: Clock) -> None:
        first, second = response("a"), response("b", "a")
        await store.put(first)
        await store.put(second)
        assert await store.get("a", "me") == first
        assert await store.chain("b", "me") == [first, second]
        assert not await has(store, "a", owner="you")
        with pytest.raises(NotStored):
            await store.delete("a", "you")
        await store.delete("a", "me")
        for gone in (store.get("a", "me"), store.chain("b", "me"), store.delete("a", "me")):
            with pytest.raises(NotStored):
                await gone

    run(scenario, tmp_path / "responses" if in_file else None)


def test_it_expires_unless_it_is_used() -> None:
    async def scenario(store: SqliteStore, clock: Clock) -> None:
        await store.put(response("a"))
        await store.put(response("alone"))
        clock.now += 60
        await store.put(response("b", "a"))
        clock.now += 60
        assert await ids(store, "b") == ["a", "b"]
        assert not await has(store, "alone")
        clock.now += 60
        assert not await has(store, "b")

    run(scenario)


def test_what_was_used_longest_ago_makes_room() -> None:
    async def scenario(store: SqliteStore, clock: Clock) -> None:
        for number in range(20):
            await store.put(response(str(number), size=1000))
            clock.now += 1
        kept = [number for number in range(20) if await has(store, str(number))]
        assert kept == list(range(20 - len(kept), 20))
        assert 8 <= len(kept) <= 9
        with pytest.raises(StoreFailed, match="larger"):
            await store.put(response("huge", size=20_000))
        assert await has(store, "19")

    run(scenario)


def test_a_chain_has_bounds() -> None:
    async def scenario(store: SqliteStore, clock: Clock) -> None:
        for number in range(6):
            await store.put(response(str(number), str(number - 1) if number else None, size=1000))
        assert len(await ids(store, "3")) == 4
        with pytest.raises(ChainTooLong):
            await store.chain("5", "me")

    run(scenario)


def test_a_chain_of_very_many_ends(tmp_path: Path) -> None:
    """Even one without an end: nobody can make it through the API."""
    path = tmp_path / "responses"

    async def scenario(store: SqliteStore, clock: Clock) -> None:
        await store.put(response("a"))
        with sqlite3.connect(path) as database:
            database.execute("UPDATE responses SET previous = 'a'")
        database.close()
        with pytest.raises(ChainTooLong):
            await store.chain("a", "me")

    run(scenario, path, StoreLimits(100.0, 10_000, max_chain_bytes=MAX_CHAIN * 1000))


def test_only_its_user_may_read_the_file(tmp_path: Path) -> None:
    async def scenario(store: SqliteStore, clock: Clock) -> None:
        await store.put(response("a"))
        names = os.listdir(tmp_path)
        modes = [stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in names]
        assert len(modes) >= 2  # the log of writes lies beside it
        assert set(modes) == {0o600}

    run(scenario, tmp_path / "responses")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    nonsense, newer = tmp_path / "nonsense", tmp_path / "newer"
    nonsense.write_bytes(os.urandom(5000))
    with sqlite3.connect(newer) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    for path in (nonsense, newer, tmp_path / "nowhere" / "x", tmp_path):
        with pytest.raises(ConfigError, match="--response-store"):
            SqliteStore(path, LIMITS)


def test_a_store_that_fails_says_so(tmp_path: Path) -> None:
    path = tmp_path / "responses"

    async def scenario(store: SqliteStore, clock: Clock) -> None:
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE responses")
        database.close()
        with pytest.raises(StoreFailed):
            await store.get("a", "me")
        with pytest.raises(StoreFailed):
            await store.put(response("a"))

    run(scenario, path)


def _write(path: Path, worker: int, count: int) -> None:
    async def start() -> None:
        store = SqliteStore(path, StoreLimits(1e6, 1 << 20, 1 << 20))
        previous = None
        for number in range(count):
            await store.put(response(f"{worker}-{number}", previous))
            previous = f"{worker}-{number}"
        await store.close()

    asyncio.run(start())


def test_processes_share_it(tmp_path: Path) -> None:
    """They open a file that is not there yet, and write at the same time."""
    path, context = tmp_path / "responses", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, index, 30)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0

    async def scenario(store: SqliteStore, clock: Clock) -> None:
        for index in range(4):
            assert len(await ids(store, f"{index}-29")) == 30

    run(scenario, path, StoreLimits(1e9, 1 << 20, 1 << 20))
