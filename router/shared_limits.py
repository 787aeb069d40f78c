"""A key's limits over several workers: its account lies in memory that all of them map.

A file in the workers' folder has a slot per key, in the keys' order:

    | missing requests, since | missing tokens, since | running at worker 0 | at worker 1 | …
    |          4 doubles: what its buckets lack       |     32 bits each, zeros at the start

Whoever counts holds the file's lock, which the kernel takes from a worker that dies. What ran there
is forgotten when its successor starts.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from router.place import Place
from router.rate_limit import Bucket, Denial, KeyLimiter, RateLimits

_LEVELS = struct.Struct("=4d")
_RUNNING_BYTES = 4


class SharedAccounts:
    """The file. Its memory is this process's until it ends."""

    def __init__(self, place: Place, num_keys: int) -> None:
        self._worker = place.index
        self._num_workers = len(place.control_ports)
        self._slot_bytes = _LEVELS.size + _RUNNING_BYTES * self._num_workers
        size = num_keys * self._slot_bytes
        self._file = os.open(place.folder / "accounts", os.O_RDWR | os.O_CREAT, 0o600)
        with self.locked():
            if os.fstat(self._file).st_size < size:
                os.truncate(self._file, size)
            self._memory = mmap.mmap(self._file, size)
            for key in range(num_keys):
                self.set_running(key, 0)

    @contextmanager
    def locked(self) -> Iterator[None]:
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def levels(self, key: int) -> tuple[float, float, float, float]:
        return _LEVELS.unpack_from(self._memory, key * self._slot_bytes)

    def set_levels(self, key: int, levels: tuple[float, ...]) -> None:
        _LEVELS.pack_into(self._memory, key * self._slot_bytes, *levels)

    def running(self, key: int) -> list[int]:
        """Requests of each worker."""
        found = struct.unpack_from(f"={self._num_workers}I", self._memory, self._running_at(key))
        return list(found)

    def set_running(self, key: int, number: int) -> None:
        """Requests of this worker."""
        at = self._running_at(key) + _RUNNING_BYTES * self._worker
        struct.pack_into("=I", self._memory, at, number)

    def _running_at(self, key: int) -> int:
        return key * self._slot_bytes + _LEVELS.size


class SharedLimiter(KeyLimiter):
    """The account of one key at all workers. Their clocks must be the same, as a machine's are."""

    def __init__(self, limits: RateLimits, accounts: SharedAccounts, key: int) -> None:
        super().__init__(limits)
        self._accounts = accounts
        self._key = key
        self._num_here = 0

    def enter(self, now: float) -> Denial | None:
        with self._synced():
            return super().enter(now)

    def charge(self, num_tokens: int, now: float) -> None:
        with self._synced():
            super().charge(num_tokens, now)

    def leave(self) -> None:
        with self._synced():
            super().leave()

    def headers(self, now: float) -> dict[str, str]:
        with self._synced():
            return super().headers(now)

    @contextmanager
    def _synced(self) -> Iterator[None]:
        """What all have done before, and what this worker does."""
        with self._accounts.locked():
            levels = self._accounts.levels(self._key)
            _load(self._requests, *levels[:2])
            _load(self._tokens, *levels[2:])
            before = self.num_running = sum(self._accounts.running(self._key))
            yield
            self._accounts.set_levels(self._key, (*_told(self._requests), *_told(self._tokens)))
            self._num_here += self.num_running - before
            self._accounts.set_running(self._key, self._num_here)


def _load(bucket: Bucket | None, missing: float, at: float) -> None:
    if bucket is not None:
        bucket.level, bucket.at = bucket.per_minute - missing, at


def _told(bucket: Bucket | None) -> tuple[float, float]:
    return (0.0, 0.0) if bucket is None else (bucket.per_minute - bucket.level, bucket.at)
