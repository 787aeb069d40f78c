"""The fleet key's file: whole and private, or one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from wire.errors import ConfigError
from wire.fleet_key import load_key, make_key, read_key, write_key


def test_a_key_comes_back_as_it_was_written(tmp_path: Path) -> None:
    keys = [make_key() for _ in range(20)]
    assert len({key.secret for key in keys}) == 20
    for number, key in enumerate(keys):
        path = tmp_path / f"{number}.key"
        write_key(key, path)
        assert path.stat().st_mode & 0o777 == 0o600
        assert read_key(path) == load_key(path) == key
        assert read_key(path).public == key.public != key.secret
    assert load_key(None) is None


def test_a_key_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_key(make_key(), tmp_path / "key")
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_secret_is_not_shown() -> None:
    key = make_key()
    assert key.secret.decode() not in repr(key)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(make_key(), path)
    written = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_key(make_key(), path)
    assert path.read_bytes() == written
    with pytest.raises(ConfigError, match="cannot write"):
        write_key(make_key(), tmp_path / "no folder" / "key")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o602, 0o610, 0o777])
def test_a_key_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    write_key(make_key(), path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=r"others can .* run `chmod 600 "):
        read_key(path)
    path.chmod(0o400)
    read_key(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-5],
        lambda text: text + text,
        lambda text: text.replace("key-1", "key-2"),
        lambda text: text.replace(":", ":x"),
        lambda text: "\xff" * 50,
        lambda text: text.strip() + "0" * 9000,
    ],
)
def test_a_garbled_file_is_one_clear_line(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    path = tmp_path / "key"
    write_key(make_key(), path)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(ConfigError, match="is no fleet key") as caught:
        read_key(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="baton keygen"):
        read_key(tmp_path / "none")
    with pytest.raises(ConfigError, match="directory"):
        read_key(tmp_path)
