"""API keys: where they come from, and which one a request carries."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api_keys import ApiKeys, load_api_keys, presented_key
from wire.errors import ConfigError


def test_each_key_is_found_and_nothing_else() -> None:
    keys = ApiKeys(["alpha", "beta", "alpha"])
    assert len(keys) == 2
    assert [keys.find(key) for key in ("alpha", "beta")] == [0, 1]
    for wrong in ("", "alph", "alphaa", "ALPHA", "gamma", "alpha\0", "ä" * 9000):
        assert keys.find(wrong) is None


def test_keys_are_not_kept_in_clear() -> None:
    assert b"alpha" not in repr(ApiKeys(["alpha"])._digests).encode()


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"Authorization": "Bearer k"}, "k"),
        ({"Authorization": "bearer   k "}, "k"),
        ({"x-api-key": "k"}, "k"),
        ({"Authorization": "Basic k", "x-api-key": "other"}, "other"),
        ({"Authorization": "Bearer k", "x-api-key": "other"}, "k"),
        ({"Authorization": "Bearer "}, None),
        ({"Authorization": "Bearer"}, None),
        ({"Authorization": "k"}, None),
        ({"Authorization": "", "x-api-key": ""}, None),
        ({}, None),
    ],
)
def test_where_a_key_may_stand(headers: dict[str, str], key: str | None) -> None:
    assert presented_key(headers) == key


@given(st.text())
def test_any_text_is_looked_up(text: str) -> None:
    keys = ApiKeys(["secret"])
    presented = presented_key({"Authorization": f"Bearer {text}"})
    found = None if presented is None else keys.find(presented)
    assert found == (0 if text.strip() == "secret" else None)


def test_a_file_has_one_key_per_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n first \r\nsecond\n#third\n")
    keys = load_api_keys(["zero"], path)
    assert [keys.find(key) for key in ("zero", "first", "second")] == [0, 1, 2]
    assert keys.find("#third") is keys.find("third") is keys.find("") is None


@pytest.mark.parametrize(("mode", "told"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_keys_that_others_can_read_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, told: int
) -> None:
    file = tmp_path / "keys"
    file.write_text("secret\n")
    file.chmod(mode)
    assert load_api_keys([], file).find("secret") == 0
    assert caplog.text.count("other users can read the API keys") == told
    assert "secret" not in caplog.text


@pytest.mark.parametrize("key", ["", "two words", "tab\t", "ä", "\n"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    with pytest.raises(ConfigError, match="printable ASCII"):
        load_api_keys([key], None)


@pytest.mark.parametrize("content", [b"", b"# only this\n", b"\xff\xfe\x00"])
def test_a_file_without_keys(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="API key"):
        load_api_keys([], path)
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        load_api_keys([], tmp_path / "none")
