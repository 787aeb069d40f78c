"""API keys: which key a request carries, found out in a time that tells nothing about the keys."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from wire.errors import ConfigError

log = logging.getLogger(__name__)

_MAX_FILE_BYTES = 1 << 20


class ApiKeys:
    """The keys that clients may use; what is kept of each is its hash."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(dict.fromkeys(_digest(key) for key in keys))

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, key: str) -> int | None:
        """The number of this key; None if it is none. Always looks at all of them."""
        digest = _digest(key)
        found = None
        for number, known in enumerate(self._digests):
            if hmac.compare_digest(digest, known):
                found = number
        return found


def presented_key(headers: Mapping[str, str]) -> str | None:
    """What stands in `Authorization: Bearer …`, else in Anthropic's `x-api-key`."""
    scheme, _, credentials = headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and credentials.strip():
        return credentials.strip()
    return headers.get("x-api-key") or None


def load_api_keys(given: Iterable[str], path: Path | None) -> ApiKeys:
    """Keys of the command line and of a file. Raises ConfigError."""
    keys = list(given)
    if path is not None:
        keys += _keys_in(path)
    for key in keys:
        if not (key.isascii() and key.isprintable()) or not key or " " in key:
            raise ConfigError("an API key must be printable ASCII without spaces, and not empty")
    return ApiKeys(keys)


def _keys_in(path: Path) -> list[str]:
    """One key per line; empty lines and lines that begin with # are none."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
                log.warning("other users can read the API keys in %s; run `chmod 600`", path)
            text = file.read(_MAX_FILE_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"cannot read the API keys in {path}: {reason}") from error
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path} has no API key; write one per line")
    return keys


def _digest(key: str) -> bytes:
    """Of equal length whatever the key's: comparing digests tells nothing about lengths."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
