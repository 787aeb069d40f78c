"""Responses in SQLite: in memory, or in a file that several router processes share.

One thread does all the work of a process, so the event loop never waits for a disk or a lock.
Between processes SQLite's own lock holds; a process that dies leaves the file whole.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from router.responses.store import ChainTooLong, NotStored, StoredResponse, StoreFailed
from wire.errors import ConfigError

Result = TypeVar("Result")

MAX_CHAIN = 4096
"""Responses that one goes on from."""
_VERSION = 1  # of the tables
_LOCK_WAIT_S = 10.0
_EVICTED_AT_ONCE = 64

_TABLES = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, used_at REAL NOT NULL,
    size INTEGER NOT NULL, response TEXT NOT NULL, input TEXT NOT NULL
);
CREATE INDEX by_use ON responses (used_at, size);
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER added AFTER INSERT ON responses BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER gone AFTER DELETE ON responses BEGIN UPDATE total SET bytes = bytes - old.size; END;
"""
_COLUMNS = "id, owner, previous, size, response, input"


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds of a store.

    Args:
        ttl_s: how long a response is kept after its last use.
        max_bytes: of all responses and inputs together, as JSON.
        max_chain_bytes: of those that one response goes on from.
    """

    ttl_s: float
    max_bytes: int
    max_chain_bytes: int


class SqliteStore:
    """Args:
        path: None keeps everything in this process's memory.
        clock: seconds of the calendar's time, as several processes and lives share it.

    Raises ConfigError for a file that cannot be used.
    """

    def __init__(
        self, path: Path | None, limits: StoreLimits, clock: Callable[[], float] = time.time
    ) -> None:
        self._limits = limits
        self._clock = clock
        self._database = _opened(path)
        self._thread = ThreadPoolExecutor(1, "responses")

    async def put(self, stored: StoredResponse) -> None:
        await self._do(lambda: self._put(stored))

    async def get(self, id: str, owner: str) -> StoredResponse:
        return await self._do(lambda: _stored(self._row(id, owner)))

    async def chain(self, id: str, owner: str) -> list[StoredResponse]:
        return await self._do(lambda: self._chain(id, owner))

    async def delete(self, id: str, owner: str) -> None:
        await self._do(lambda: self._delete(id, owner))

    async def close(self) -> None:
        await self._do(self._database.close)
        self._thread.shutdown()

    async def _do(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise StoreFailed(str(error)) from error

    # ------------------------------------------------------------ in the thread

    def _put(self, stored: StoredResponse) -> None:
        response, given = json.dumps(stored.response), json.dumps(stored.input)
        size = len(response) + len(given)
        if size > self._limits.max_bytes:
            raise StoreFailed(f"a response of {size} bytes is larger than the store")
        now = self._clock()
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?)",
                (stored.id, stored.owner, stored.previous, now, size, response, given),
            )
            self._touch(stored.previous, now)
            database.execute("DELETE FROM responses WHERE used_at < ?", (now - self._limits.ttl_s,))
            self._evict()

    def _touch(self, id: str | None, now: float) -> None:
        """Whoever goes on from a response uses it, and all that precede it."""
        for _ in range(MAX_CHAIN):
            if id is None:
                return
            changed = self._database.execute(
                "UPDATE responses SET used_at = ? WHERE id = ? RETURNING previous", (now, id)
            ).fetchall()
            id = changed[0][0] if changed else None

    def _evict(self) -> None:
        """Make room: who was used longest ago goes first."""
        while (total := self._database.execute("SELECT bytes FROM total").fetchone()[0]) > (
            self._limits.max_bytes
        ):
            oldest = self._database.execute(
                f"SELECT id, size FROM responses ORDER BY used_at, rowid LIMIT {_EVICTED_AT_ONCE}"
            ).fetchall()
            for id, size in oldest:
                if total <= self._limits.max_bytes:
                    break
                self._database.execute("DELETE FROM responses WHERE id = ?", (id,))
                total -= size

    def _chain(self, id: str, owner: str) -> list[StoredResponse]:
        rows: list[_Row] = []
        size, next_id = 0, id
        while next_id:
            row = self._row(next_id, owner)
            rows.append(row)
            size += row[3]
            next_id = row[2] or ""
            if len(rows) > MAX_CHAIN or size > self._limits.max_chain_bytes:
                raise ChainTooLong
        return [_stored(row) for row in reversed(rows)]

    def _delete(self, id: str, owner: str) -> None:
        with self._database as database:
            database.execute("BEGIN IMMEDIATE")
            self._row(id, owner)
            database.execute("DELETE FROM responses WHERE id = ?", (id,))

    def _row(self, id: str, owner: str) -> _Row:
        row: _Row | None = self._database.execute(
            f"SELECT {_COLUMNS} FROM responses WHERE id = ? AND owner = ? AND used_at >= ?",
            (id, owner, self._clock() - self._limits.ttl_s),
        ).fetchone()
        if row is None:
            raise NotStored(id)
        return row


_Row = tuple[str, str, str | None, int, str, str]


def _stored(row: _Row) -> StoredResponse:
    id, owner, previous, _, response, given = row
    return StoredResponse(id, owner, previous, json.loads(response), json.loads(given))


def _opened(path: Path | None) -> sqlite3.Connection:
    """With its tables. Raises ConfigError."""
    try:
        if path is not None:  # texts of clients: for this user alone
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        database = sqlite3.connect(
            ":memory:" if path is None else path,
            timeout=_LOCK_WAIT_S,
            isolation_level=None,  # transactions begin where we say
            check_same_thread=False,  # opened here, used in the store's thread
        )
        _prepare(database)
    except OSError as error:
        raise ConfigError(f"cannot open --response-store {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise ConfigError(f"--response-store {path} cannot be used: {error}") from error
    return database


def _prepare(database: sqlite3.Connection) -> None:
    with database:
        database.execute("BEGIN IMMEDIATE")  # of several processes one makes the tables
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            for statement in _statements():
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        elif version != _VERSION:
            raise sqlite3.DatabaseError(f"its tables are of version {version}, not {_VERSION}")
    database.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
    database.execute("PRAGMA synchronous = NORMAL")  # a power cut may cost the newest


def _statements() -> list[str]:
    """A trigger has a semicolon within."""
    found, statement = [], ""
    for line in _TABLES.strip().splitlines():
        statement += f"{line}\n"
        if sqlite3.complete_statement(statement):
            found.append(statement)
            statement = ""
    return found
