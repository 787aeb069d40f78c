"""Ports that are kept: nobody gets them by chance, children do, and a stranger's is refused."""

from __future__ import annotations

import socket

import pytest

from baton.ports import reserve_consecutive, reserve_shared
from wire.errors import ConfigError


def listener(port: int, *, share: bool) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen()
    return sock


def test_several_listen_on_a_shared_port_and_it_stays_theirs() -> None:
    with reserve_shared("127.0.0.1", 0) as port:
        with listener(port, share=True), listener(port, share=True):
            for _ in range(10):  # the reservation itself takes no connection
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    with reserve_shared("127.0.0.1", port) as again:
        assert again == port


def test_a_shared_port_that_a_stranger_shares_is_refused() -> None:
    with (
        reserve_shared("127.0.0.1", 0) as port,
        listener(port, share=True),
        pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: "),
        reserve_shared("127.0.0.1", port),
    ):
        pass


def test_a_child_listens_on_a_kept_port() -> None:
    with reserve_consecutive("127.0.0.1", 0, 3) as ports:
        assert len(set(ports)) == 3
        for port in ports:
            listener(port, share=False).close()
            listener(port, share=False).close()  # and its successor


def test_consecutive_ports_of_which_one_is_taken() -> None:
    with reserve_consecutive("127.0.0.1", 0, 1) as (port,):
        pass
    with (
        listener(port, share=False),
        pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: "),
        reserve_consecutive("127.0.0.1", port - 1, 2),
    ):
        pass


def test_hosts_that_are_none() -> None:
    for host in ("no host", "256.256.256.256"):
        with pytest.raises(ConfigError, match="cannot listen on"), reserve_shared(host, 0):
            pass
