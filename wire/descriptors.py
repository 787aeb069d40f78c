"""How many sockets and files this process may have open at the same time."""

from __future__ import annotations

import resource

MANY = 1 << 16
"""Enough for every stream; some systems allow a thousand million, which makes other code slow."""


def allow_many() -> int:
    """Take what the system allows instead of what a shell gives (often 1,024); returns it.

    Each stream, each connected peer, and each stranger who holds a connection open takes one.
    """
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY if most == resource.RLIM_INFINITY else min(most, MANY)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return wanted
