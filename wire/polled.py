"""A ZMQ socket in an asyncio loop: synchronous sends that never block, a callback per message.

Why not zmq.asyncio: its receive costs a future and two loop turns per message, and its send is a
future as well; here a message costs one call, and a full outbox is an exception where it is sent.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import zmq

log = logging.getLogger(__name__)

_BURST = 64  # messages handled before the loop gets its turn again
LINGER_MS = 300  # how long `close` may take to deliver a last word


class PolledSocket:
    """Calls `receive_one(socket)` from the running loop for every waiting message.

    ZMQ's file descriptor is edge-triggered: it tells of a change, not of a state. So reading goes
    on until the socket is empty, and every send looks again (a send may swallow the edge).
    """

    def __init__(self, socket: zmq.Socket[bytes], receive_one: Callable[[zmq.Socket[bytes]], None]):
        self._socket = socket
        self._receive_one = receive_one
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._fd = socket.fileno()  # kept, because a socket that its context closed has none
        self._loop.add_reader(self._fd, self._drain)
        self._schedule()

    def send(self, frames: Sequence[Any], *, copy: bool = True, track: bool = False) -> Any:
        """Queue one message. Raises zmq.Again where the outbox is full, and never blocks."""
        try:
            return self._socket.send_multipart(frames, zmq.NOBLOCK, copy=copy, track=track)
        finally:
            self._schedule()

    def close(self, linger_ms: int = LINGER_MS) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._socket.close(linger_ms)

    @property
    def closed(self) -> bool:
        return self._socket.closed

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._drain_scheduled)

    def _drain_scheduled(self) -> None:
        self._scheduled = False
        self._drain()

    def _drain(self) -> None:
        for _ in range(_BURST):
            if self._socket.closed:
                return
            try:
                self._receive_one(self._socket)
            except zmq.Again:
                return
            except zmq.ContextTerminated:
                self.close(0)
            except Exception:  # a bug in a handler must not end the process
                log.exception("a message handler failed")
        self._schedule()
