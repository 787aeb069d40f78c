"""Ports that stay this process's while its children come and go.

A socket that is bound and never listens holds a port without taking connections: the kernel gives
it to nobody who asks for any port, and a child that binds with the same option gets it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from wire.errors import ConfigError

_MAX_PORT = 0xFFFF


@contextmanager
def reserve_shared(host: str, port: int) -> Iterator[int]:
    """A port (0: any free one) that children bind with SO_REUSEPORT. Raises ConfigError.

    The option lets strangers of the same user in as well: two launchers on one port would share its
    connections without a word. So first it must be free for one who does not share.
    """
    with ExitStack() as held:
        for family, address in _addresses(host, port):
            wanted = (address[0], port, *address[2:])
            _bind(family, wanted, share=False).close()
            sock = held.enter_context(_bind(family, wanted, share=True))
            port = sock.getsockname()[1]
        yield port


@contextmanager
def reserve_consecutive(host: str, port: int, number: int) -> Iterator[tuple[int, ...]]:
    """So many ports from `port` on (0: any free ones). Raises ConfigError."""
    if port + number - 1 > _MAX_PORT:
        raise ConfigError(f"there are no {number} ports from {port} on")
    with ExitStack() as held:
        family, address = _addresses(host, port)[0]
        ports = []
        for wanted in range(port, port + number) if port else [0] * number:
            sock = held.enter_context(
                _bind(family, (address[0], wanted, *address[2:]), share=False)
            )
            ports.append(sock.getsockname()[1])
        yield tuple(ports)


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return list(dict.fromkeys((entry[0], entry[4]) for entry in found))


def _bind(family: socket.AddressFamily, address: tuple[Any, ...], *, share: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"cannot listen on {address[0]}:{address[1]}: {error.strerror or error}"
        ) from error
    return sock
