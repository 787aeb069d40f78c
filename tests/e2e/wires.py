"""Cuts the UCX connections between two processes, from outside, as a broken network would."""

from __future__ import annotations

import ctypes
import errno
import os
import socket

import psutil

from tests.e2e.fleet import Process

_PIDFD_GETFD = 438  # the number is the same on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)


def cut_ucx(*nodes: Process) -> None:
    """Shut every socket of UCX in these nodes; they cannot connect again either."""
    ports = {port for node in nodes for port in _ucx_ports(node)}
    assert ports, "no node has UCX"
    for node in nodes:
        for connection in psutil.Process(node.pid).net_connections("tcp"):
            remote = connection.raddr.port if connection.raddr else None
            if connection.laddr.port in ports or remote in ports:
                _shut(node.pid, connection.fd)


def _ucx_ports(node: Process) -> set[int]:
    """Where the node listens for neither HTTP nor ZMQ."""
    http = int(node.url.rpartition(":")[2])
    connections = psutil.Process(node.pid).net_connections("tcp")
    listening = {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}
    return {port for port in listening - {http} if not _speaks_first(port)}


def _speaks_first(port: int) -> bool:
    """ZMQ greets whoever connects, UCX waits to be greeted."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as probe:
        probe.settimeout(1.0)
        try:
            return bool(probe.recv(1))
        except TimeoutError:
            return False


def _shut(pid: int, fd: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        own = _LIBC.syscall(_PIDFD_GETFD, pidfd, fd, 0)
        if own < 0 and ctypes.get_errno() == errno.EBADF:
            return  # closed since it was listed, as `_speaks_first` leaves one
        assert own >= 0, os.strerror(ctypes.get_errno())
        with socket.socket(fileno=own) as theirs:
            theirs.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(pidfd)
