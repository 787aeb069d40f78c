"""One account at several workers: nobody gets more by asking another one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from router.place import Place
from router.rate_limit import KeyLimiter, RateLimits
from router.shared_limits import SharedAccounts, SharedLimiter

LIMITS = RateLimits(requests_per_minute=10, tokens_per_minute=100, max_concurrency=3)


def limiter(folder: Path, worker: int, limits: RateLimits = LIMITS, key: int = 1) -> SharedLimiter:
    return SharedLimiter(limits, SharedAccounts(Place(worker, folder, (1, 2)), 3), key)


def remaining(limiter: KeyLimiter, now: float) -> list[str]:
    return [text for name, text in limiter.headers(now).items() if "reset" not in name]


def test_two_workers_grant_what_one_would(tmp_path: Path) -> None:
    one, two, other = (limiter(tmp_path, 0), limiter(tmp_path, 1), limiter(tmp_path, 0, key=2))
    alone = KeyLimiter(LIMITS)
    for turn in range(40):
        now = 1000 + turn / 3
        shared = (one, two)[turn % 2]
        denial, expected = shared.enter(now), alone.enter(now)
        assert (denial is None) == (expected is None), turn
        if denial is not None and expected is not None:
            assert denial.what == expected.what
            assert denial.retry_after_s == pytest.approx(expected.retry_after_s)
        else:
            shared.charge(7, now)
            alone.charge(7, now)
        assert remaining(shared, now) == remaining(alone, now)
        if denial is None and turn % 5:
            (two, one)[turn % 2].num_running = 99  # what it knew is looked up anew
            shared.leave()
            alone.leave()
    assert other.enter(1014.0) is None
    assert other.headers(1014.0)["x-ratelimit-remaining-requests"] == "9"


def test_a_machine_that_has_just_started_grants_all(tmp_path: Path) -> None:
    assert limiter(tmp_path, 0).headers(0.5)["x-ratelimit-remaining-requests"] == "10"


def test_what_ran_at_a_dead_worker_is_forgotten_and_what_it_used_is_not(tmp_path: Path) -> None:
    dead, other = limiter(tmp_path, 0), limiter(tmp_path, 1)
    for _ in range(2):
        assert dead.enter(5.0) is None
    assert other.enter(5.0) is None
    assert other.enter(5.0) is not None
    successor = limiter(tmp_path, 0)
    assert [successor.enter(5.0), other.enter(5.0)] == [None, None]
    assert other.enter(5.0) is not None
    assert other.headers(5.0)["x-ratelimit-remaining-requests"] == "5"


def test_processes_that_count_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    limits = RateLimits(requests_per_minute=100_000)
    limiter(tmp_path, 0, limits)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_count, args=(tmp_path, index, limits)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    left = limiter(tmp_path, 0, limits).headers(7.0)["x-ratelimit-remaining-requests"]
    assert int(left) == 100_000 - 2 * 2000


def _count(folder: Path, worker: int, limits: RateLimits) -> None:
    mine = limiter(folder, worker, limits)
    for _ in range(2000):
        assert mine.enter(7.0) is None
        mine.leave()
