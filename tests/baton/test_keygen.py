"""`baton keygen`: one private file, and what to do with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cli import main
from wire.fleet_key import read_key


def test_a_key_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for words, path in (
        ([], tmp_path / "fleet.key"),
        (["--out", "folder"], tmp_path / "folder" / "fleet.key"),
        (["--out", "other.key"], tmp_path / "other.key"),
    ):
        assert main(["keygen", *words]) == 0
        said = capsys.readouterr().out
        assert "--key-file" in said
        assert str(path.relative_to(tmp_path)) in said
        assert read_key(path).secret.decode() not in said


def test_a_second_one_does_not_replace_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keygen", "--out", str(tmp_path)]) == 0
    first = read_key(tmp_path / "fleet.key")
    assert main(["keygen", "--out", str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert read_key(tmp_path / "fleet.key") == first
