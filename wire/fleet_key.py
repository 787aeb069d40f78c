"""The fleet key: one file that every router and node of a fleet has, and nobody else.

It holds one CURVE25519 secret. Its holder proves it at both ends of a connection, as server and as
client, so a fleet needs one file and no list of members. Whoever has the file is the fleet.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from wire.errors import ConfigError

_PREFIX = "baton-fleet-key-1:"  # the number is the format's
_LINE = re.compile(re.escape(_PREFIX) + r"([0-9a-f]{64})")
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class FleetKey:
    """The key pair in libzmq's own encoding (Z85)."""

    secret: bytes = field(repr=False)

    @property
    def public(self) -> bytes:
        return zmq.curve_public(self.secret)


def make_key() -> FleetKey:
    return FleetKey(zmq.curve_keypair()[1])


def write_key(key: FleetKey, path: Path) -> None:
    """Write a file that only its owner reads. Raises ConfigError if it cannot, or is there."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists; move it away if its fleet needs it no more") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{_PREFIX}{z85.decode(key.secret).hex()}\n")


def load_key(path: Path | None) -> FleetKey | None:
    """What `--key-file` names, if it was given. Raises ConfigError."""
    return None if path is None else read_key(path)


def read_key(path: Path) -> FleetKey:
    """Raises ConfigError where there is none, where others can read it, or where it is no key."""
    try:
        with path.open("rb") as file:
            _check_mode(path, os.fstat(file.fileno()))
            text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        raise ConfigError(
            f"there is no key file {path}; make one with `baton keygen`, or copy the fleet's"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    found = _LINE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{path} is no fleet key; copy the file that `baton keygen` wrote")
    return FleetKey(z85.encode(bytes.fromhex(found[1])))


def _check_mode(path: Path, stat: os.stat_result) -> None:
    """Its owner alone; a file of root's may be read by a group (as orchestrators mount them)."""
    allowed = 0o700 if stat.st_uid == os.geteuid() else 0o740
    if stat.st_mode & 0o777 & ~allowed:
        raise ConfigError(f"others can read the key file {path}; run `chmod 600 {path}`")
