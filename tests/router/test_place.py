"""A worker's place among the others, as its launcher writes it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from router.__main__ import main
from router.place import Place, add_place_argument


@pytest.mark.parametrize("returns", [True, False])
def test_a_place_arrives_as_it_was_written(returns: bool) -> None:
    place = Place(3, Path("/tmp/a folder:with colons"), (7400, 7401), returns)
    parser = argparse.ArgumentParser()
    add_place_argument(parser)
    assert parser.parse_args([place.flag()]).place == place


def test_several_workers_need_a_launcher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--workers", "2"]) == 1
    assert "`baton router --workers N`" in capsys.readouterr().err
