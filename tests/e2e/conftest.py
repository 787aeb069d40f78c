"""Fixtures that own real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def fleets(zygote: Zygote, folder: Path) -> Iterator[MakeFleet]:
    """Makes fleets of the bundled model, and ends them."""
    made: list[Fleet] = []

    def make() -> Fleet:
        place = folder / str(len(made))
        place.mkdir()
        made.append(Fleet(zygote, place, DEFAULT_MODEL))
        return made[-1]

    yield make
    for fleet in made:
        fleet.close()
        print(fleet.logs())


@pytest.fixture
def make_fleet(zygote: Zygote, tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes fleets of the bundled model; prints their logs when the test fails."""
    with fleets(zygote, tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def make_shared_fleet(
    zygote: Zygote, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeFleet]:
    """The same for fleets that the tests of a module share; each test heals them."""
    with fleets(zygote, tmp_path_factory.mktemp("fleet")) as make:
        yield make
