"""Files that a command leaves behind; that one cannot be written is known before the work."""

from __future__ import annotations

from pathlib import Path

from wire.errors import ConfigError


def check_places(*paths: Path | None) -> None:
    """Raise ConfigError where there is no folder for a file, or a folder is in its place."""
    for path in paths:
        if path is None or path == Path("-"):
            continue
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {path.parent}")


def write_text(path: Path, text: str) -> None:
    """Raises ConfigError where it cannot be written after all."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
