"""Rules of the repository that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Written in halves so that this file does not name them.
HOSTS = [
    "py" + "pi.org",
    "python" + "hosted.org",
    "download.py" + "torch.org",
    "npm" + "js.org",
    "ana" + "conda.org",
    "crates" + ".io",
    "proxy." + "golang.org",
]
MACHINE_PATH = re.compile(r"(?<![\w.$}~*-])/(?:home|root|work|Users|mnt)/[\w.]")


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, timeout=60)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def tracked_texts() -> dict[str, str]:
    """Name → content of every tracked file that is text."""
    texts = {}
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            texts[str(path.relative_to(ROOT))] = data.decode(errors="replace")
    return texts


def test_no_init_below_tests() -> None:
    """One of them, and `import kernels` finds the tests instead of the package."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_no_registry_host_is_named() -> None:
    named = [
        f"{name} names {host}"
        for name, text in tracked_texts().items()
        for host in HOSTS
        if host in text
    ]
    assert not named


def test_no_path_of_somebodys_machine() -> None:
    found = [
        f"{name}: {text[match.start() : match.start() + 60]!r}"
        for name, text in tracked_texts().items()
        if (match := MACHINE_PATH.search(text))
    ]
    assert not found


def test_the_path_pattern_knows_a_path_from_a_route() -> None:
    for text in ("see /home" + "/ann/x", '"/root' + '/.cache"', "file:///work" + "/main"):
        assert MACHINE_PATH.search(text), text
    for text in ("http://host/work/1", "$HOME/work/x", "a/home/b", "~/work/x"):
        assert not MACHINE_PATH.search(text), text


def test_every_package_is_typed_and_says_what_it_is() -> None:
    for init in ROOT.glob("*/__init__.py"):
        assert (init.parent / "py.typed").exists(), init.parent.name


def test_only_the_config_reads_the_environment() -> None:
    readers = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for init in ROOT.glob("*/__init__.py")
        for path in init.parent.rglob("*.py")
        if path != ROOT / "baton" / "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert not readers
