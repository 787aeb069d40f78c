"""A node's connection to one router: registration, heartbeats both ways, and its end.

    connecting ── Register ──▶ (Welcome) ──▶ registered ── silence or Gone ──▶ connecting

Registration is repeated until it is answered, so neither side needs to start first, and a router
that was restarted gets the node back without anybody's help.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import zmq

from wire.codec import Envelope
from wire.errors import WireError
from wire.fleet_messages import Gone, Register, RouterHeartbeat, Unwelcome, Welcome
from wire.messages import Message
from wire.sockets import Link
from wire.types import NodeId

log = logging.getLogger(__name__)

_ROUTER_TIMEOUT_S = 5.0  # a router that is silent for so long is dead
_TIMEOUT_BEATS = 3  # but not before it has left out so many heartbeats
_REGISTER_AGAIN_S = 0.5
_CONNECTING_S = 0.05  # how often to try while a connection is being made
_PAUSE_S = 1.0  # a beat that is so late tells that this process stood still
_BACKLOG_S = 0.5  # how long after a pause what is read may be from before its end


class RouterLink:
    """One router, as this node sees it.

    Args:
        on_message: gets everything but registration and heartbeats.
        on_welcome: called after each registration.
        on_lost: the router, or this life of it, is gone; its requests are nobody's.
        on_unwelcome: the router refuses this node for good.
    """

    def __init__(
        self,
        me: NodeId,
        url: str,
        register: Register,
        *,
        on_message: Callable[[RouterLink, Message], None],
        on_welcome: Callable[[RouterLink], None],
        on_lost: Callable[[RouterLink], None],
        on_unwelcome: Callable[[str], None],
        context: zmq.Context[Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        self.heartbeat_s = _REGISTER_AGAIN_S
        self.control_ports: tuple[int, ...] = ()  # as its Welcome told them
        self._register = register
        self._on_message = on_message
        self._on_welcome = on_welcome
        self._on_lost = on_lost
        self._on_unwelcome = on_unwelcome
        self._clock = clock
        self._router: NodeId | None = None
        self._last_heard = self._last_beat = self._away_since = clock()
        self._paused_at = float("-inf")  # when this process last noticed that it had stood still
        self._absence_told = False
        self._refusal_told = ""
        self._link = Link(
            me,
            url,
            self._receive,
            context,
            queue_while_away=False,
            on_refused=self._refused,
        )

    @property
    def registered(self) -> bool:
        return self._router is not None

    def send(self, message: Message) -> bool:
        """Send to the registered router; False if it could not be queued."""
        if self._router is None:
            return False
        try:
            self._link.send(message, self._router)
        except WireError as error:
            log.info("lost the router: %s", error)
            self._lose()
            return False
        return True

    def beat(self, heartbeat: Message) -> None:
        """Called every `heartbeat_s`: register, or say that this node lives."""
        now = self._clock()
        if now - self._last_beat > self._timeout_s / 2:
            self._last_heard = now  # this process was away itself; what it was told is yet unread
        if self._is_late(now):
            self._paused_at = now
        self._last_beat = now
        if self._router is None:
            self._try_register(now)
        elif now - self._last_heard > self._timeout_s:
            log.warning("router %s is silent; dropping its requests", self.url)
            self._lose()
        else:
            self.send(heartbeat)

    @property
    def reads_backlog(self) -> bool:
        """Whether what is read now may have been said long ago, and be no longer meant.

        Who stood still finds all that he was told meanwhile; that he was given up comes last.
        """
        now = self._clock()
        return self._is_late(now) or now - self._paused_at < _BACKLOG_S

    def _is_late(self, now: float) -> bool:
        return now - self._last_beat > max(_PAUSE_S, 2 * self.heartbeat_s)

    @property
    def num_malformed(self) -> int:
        return self._link.num_malformed

    def close(self) -> None:
        """Say nothing more; what was sent before may still leave."""
        self._router = None
        self._link.close()

    @property
    def _timeout_s(self) -> float:
        return max(_ROUTER_TIMEOUT_S, _TIMEOUT_BEATS * self.heartbeat_s)

    def _try_register(self, now: float) -> None:
        if not self._absence_told and now - self._away_since > _ROUTER_TIMEOUT_S:
            self._absence_told = True
            log.warning("no router answers at %s; asking on", self.url)
        self.heartbeat_s = _REGISTER_AGAIN_S
        try:
            self._link.send(self._register, None)
        except WireError:
            log.debug("router %s is not there yet", self.url)
            if not self._absence_told:
                self.heartbeat_s = _CONNECTING_S

    def _refused(self, reason: str) -> None:
        if reason != self._refusal_told:
            self._refusal_told = reason
            self._absence_told = True
            log.warning("router %s does not let this node in: %s; asking on", self.url, reason)

    def _receive(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Welcome):
            self._welcome(envelope.sender, message)
        elif isinstance(message, Unwelcome):
            self._on_unwelcome(f"router {self.url} refused this node: {message.reason}")
        elif isinstance(message, Gone) and self._router in (message.meant_for, envelope.sender):
            self._lose()
        elif envelope.sender != self._router:
            log.debug("router %s: ignored a message of %s", self.url, envelope.sender)
        else:
            self._last_heard = self._clock()
            if not isinstance(message, RouterHeartbeat):
                self._on_message(self, message)

    def _welcome(self, router: NodeId, message: Welcome) -> None:
        if router == self._router:
            return
        if self._router is not None:
            self._lose()
        self._router = router
        self._refusal_told = ""
        self._last_heard = self._clock()
        self.heartbeat_s = max(0.05, message.heartbeat_s)
        self.control_ports = message.control_ports
        self._on_welcome(self)

    def _lose(self) -> None:
        if self._router is not None:
            self._router = None
            self.heartbeat_s = _CONNECTING_S
            self._away_since, self._absence_told = self._clock(), False
            self._on_lost(self)
