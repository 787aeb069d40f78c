"""The `baton` command: what it prints, and what it returns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from baton import cli
from baton.cli import COMMANDS, main
from wire.errors import BatonError, ConfigError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in said
        assert command.help in said


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"baton {metadata.version('baton-serve')}\n"


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sevre"]) == 2
    assert "no command 'sevre'" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: baton {name} ")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--no-such-flag"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--no-such-flag" in said or "required" in said


def test_help_needs_no_torch() -> None:
    """Seconds are too long for a question; `serve` itself never needs it."""
    program = """
import sys
from baton.cli import main
for name in ("serve", "router", "prefill", "decode", "bench"):
    try:
        main([name, "--help"])
    except SystemExit:
        pass
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["serve", "prefill", "decode"])
def test_a_model_that_is_not_there(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "/no/such/model"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said == [f"baton {name}: there is no model folder '/no/such/model'"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("give --port"), 1, "baton serve: give --port\n"),
        (BatonError("something else"), 1, "baton serve: something else\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def fail(argv: Sequence[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=fail))
    assert main(["serve"]) == code
    assert capsys.readouterr().err == said
