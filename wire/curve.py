"""Who may connect: CURVE on every TCP socket of a context, and what became of those who may not.

A context with the fleet's key lets in only peers that prove the same key; nothing that others send
is read. CURVE alone admits whoever knows the server's public half, so libzmq also asks the door
(ZAP, https://rfc.zeromq.org/spec/27) whether the client's half is the fleet's.

    the peer has    the server sees                the peer sees
    another key     FAILED_PROTOCOL                a connection that closes in the handshake
    no key          either of these two, the peer the other one
"""

from __future__ import annotations

import hmac
import itertools
import logging
import struct
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils import z85

from wire.fleet_key import FleetKey
from wire.polled import PolledSocket

log = logging.getLogger(__name__)

SILENCE = "no answer"
_DOOR = "inproc://zeromq.zap.01"  # the address that libzmq asks
_DOMAIN = b"baton"
_EVENT = struct.Struct("=HI")  # of a monitor: the event, and its value
_EVENTS_WAITING = 10_000  # beyond it libzmq's own thread waits, not this process's memory
_HANDSHAKE_MS = 5_000
"""How long a peer may take to prove itself. Before that it may send a message of any allowed size,
which libzmq holds: four strangers held 420 MB for its own 30 s (measured). This bounds what the
line carries in the time; who was only slow connects again."""
_REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_numbers = itertools.count()  # monitors need names that nobody else in the process has


class FleetContext(zmq.Context[Any]):
    """A context whose sockets talk to holders of `key` only; without a key, to everybody.

    Attributes:
        num_refused: connections to this context's bound sockets that failed in the handshake.
    """

    key: FleetKey | None = None
    num_refused: int = 0
    _own: list[Watch | PolledSocket] | None = None

    def __init__(self, key: FleetKey | None = None) -> None:
        super().__init__()
        self.key = key
        self.num_refused = 0
        self._own = []

    def guard_server(self, socket: zmq.Socket[Any]) -> None:
        """Before `bind`: admit only the fleet. Needs a running loop where there is a key."""
        socket.handshake_ivl = _HANDSHAKE_MS
        if self.key is None:
            return
        assert self._own is not None
        if not self._own:
            self._own.append(_open_door(self, self.key))
        _set_pair(socket, self.key)
        socket.curve_server = True
        socket.zap_domain = _DOMAIN
        socket.zap_enforce_domain = True  # no door, no entry
        self._own.append(Watch(socket, self._refused))

    def guard_client(self, socket: zmq.Socket[Any]) -> None:
        """Before `connect`: prove the key, and accept no server that does not."""
        if self.key is not None:
            _set_pair(socket, self.key)
            socket.curve_serverkey = self.key.public

    def destroy(self, linger: int | None = None) -> None:
        for own in self._own or ():
            own.close()
        super().destroy(linger)

    def _refused(self, event: int) -> None:
        self.num_refused += 1
        if self.num_refused == 1:
            mute = event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            whose = "without a fleet key, or none of Baton's" if mute else "with another fleet key"
            log.warning("refused a peer %s (only counted from now on)", whose)


class Watch:
    """Calls `on_refusal(event)` in the running loop for every handshake that fails."""

    def __init__(self, socket: zmq.Socket[Any], on_refusal: Callable[[int], None]) -> None:
        self._socket = socket
        self._on_refusal = on_refusal
        monitor = _monitor(socket, _REFUSALS | zmq.EVENT_MONITOR_STOPPED)
        self._polled = PolledSocket(monitor, self._receive_one)

    def close(self) -> None:
        """In this order: libzmq's thread would wait for ever to tell an event to nobody."""
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._polled.close(0)

    def _receive_one(self, monitor: zmq.Socket[bytes]) -> None:
        event, _ = _EVENT.unpack(monitor.recv_multipart(zmq.NOBLOCK)[0])
        if event == zmq.EVENT_MONITOR_STOPPED:  # the socket is closed
            self._polled.close(0)
        else:
            self._on_refusal(event)


def refusal(event: int, *, keyed: bool) -> str | None:
    """Why a server did not let this process in, in words; None if it may just have ended.

    Which side notices first that the other has no key is a race: the words fit both.
    """
    if keyed:
        return "it does not take this process's fleet key (--key-file)"
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return None
    return "it wants a fleet key (--key-file) and this process has none"


def knock(url: str, key: FleetKey | None, timeout_s: float) -> str | None:
    """Shake hands with whoever is bound at `url`, without a loop; None if both are content.

    Returns SILENCE after the timeout, and otherwise the reason why not. May raise ZMQError.
    """
    with FleetContext(key) as context, context.socket(zmq.DEALER) as socket:
        context.guard_client(socket)
        socket.linger = 0
        with _monitor(socket, _REFUSALS | zmq.EVENT_HANDSHAKE_SUCCEEDED) as monitor:
            if "[" in url:
                socket.ipv6 = True
            socket.connect(url)
            deadline = time.monotonic() + timeout_s
            while monitor.poll(max(0, int(1000 * (deadline - time.monotonic())))):
                event, _ = _EVENT.unpack(monitor.recv_multipart()[0])
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return None
                if (reason := refusal(event, keyed=key is not None)) is not None:
                    return reason
    return SILENCE


def _set_pair(socket: zmq.Socket[Any], key: FleetKey) -> None:
    socket.curve_publickey = key.public
    socket.curve_secretkey = key.secret


def _monitor(socket: zmq.Socket[Any], events: int) -> zmq.Socket[bytes]:
    address = f"inproc://monitor-{next(_numbers)}"
    socket.monitor(address, events)
    monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
    monitor.rcvhwm = _EVENTS_WAITING
    monitor.linger = 0
    monitor.connect(address)
    return monitor


def _open_door(context: zmq.Context[Any], key: FleetKey) -> PolledSocket:
    """Answer libzmq's questions whether a client may enter."""
    fleet = z85.decode(key.public)

    def answer(door: zmq.Socket[bytes]) -> None:
        version, number, _, _, _, mechanism, *proven = door.recv_multipart(zmq.NOBLOCK)
        known = mechanism == b"CURVE" and hmac.compare_digest(proven[0], fleet)
        status = (b"200", b"OK") if known else (b"400", b"another key")
        door.send_multipart([version, number, *status, b"", b""])

    door: zmq.Socket[bytes] = context.socket(zmq.REP)
    door.linger = 0
    door.bind(_DOOR)
    return PolledSocket(door, answer)
