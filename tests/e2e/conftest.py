"""Fixtures that own real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.fleet import Fleet, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


MakeFleet = Callable[[], Fleet]


@pytest.fixture
def make_fleet(zygote: Zygote, tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes fleets of the bundled model; prints their logs when the test fails."""
    fleets: list[Fleet] = []

    def make() -> Fleet:
        folder = tmp_path / str(len(fleets))
        folder.mkdir()
        fleets.append(Fleet(zygote, folder, DEFAULT_MODEL))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()
        print(fleet.logs())
