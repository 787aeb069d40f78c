"""Open files: as many as the system allows and streams need, whatever the shell gave."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from wire.descriptors import MANY, allow_many


@pytest.fixture
def hard() -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_shell_s_limit_is_raised(hard: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    allowed = allow_many()
    assert allowed == (MANY if hard == resource.RLIM_INFINITY else min(MANY, hard))
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (allowed, hard)


def test_what_is_allowed_is_enough_where_it_is_less(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: taken.append(limits))
    for known, expected in (
        ((1024, 4096), 4096),
        ((8, 1 << 30), MANY),
        ((1 << 20, 1 << 20), 1 << 20),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, known=known: known)
        assert allow_many() == expected
    assert taken == [(4096, 4096), (MANY, 1 << 30)]
