"""A prefill node's connections to decode nodes, made when a grant first names one."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import zmq

from wire.codec import Envelope
from wire.errors import ConfigError, WireError
from wire.fleet_messages import Gone
from wire.messages import Message
from wire.request_messages import Grant
from wire.sockets import Link
from wire.types import NodeId

log = logging.getLogger(__name__)

_IDLE_S = 300.0  # connections to decode nodes that are gone must not pile up


@dataclass(slots=True)
class _Peer:
    link: Link
    last_used: float


class PeerLinks:
    """One link per life of a decode node."""

    def __init__(
        self,
        me: NodeId,
        on_message: Callable[[NodeId, Message], None],
        context: zmq.Context[Any],
    ) -> None:
        self._me = me
        self._on_message = on_message
        self._context = context
        self._peers: dict[NodeId, _Peer] = {}

    def send(self, grant: Grant, message: Message) -> None:
        """Send to the decode node that gave `grant`. May raise WireError."""
        peer = self._peers.get(grant.decode)
        if peer is None:
            peer = self._peers[grant.decode] = _Peer(self._connect(grant), 0.0)
        peer.last_used = time.monotonic()
        peer.link.send(message, grant.decode)

    def _connect(self, grant: Grant) -> Link:
        receive = partial(self._receive, grant.decode)
        try:
            return Link(self._me, grant.peer_url, receive, self._context)
        except (ConfigError, zmq.ZMQError) as error:  # no such address, or too many sockets
            raise WireError(f"cannot connect to {grant.peer_url!r}: {error}") from error

    def close_idle(self) -> None:
        """Close links that were not used for long."""
        horizon = time.monotonic() - _IDLE_S
        for node in [node for node, peer in self._peers.items() if peer.last_used < horizon]:
            self._peers.pop(node).link.close()

    def close(self) -> None:
        for peer in self._peers.values():
            peer.link.close()
        self._peers.clear()

    def _receive(self, decode: NodeId, envelope: Envelope) -> None:
        """Who answers at that address speaks for `decode` alone, and another only of its end."""
        message = envelope.message
        if envelope.sender == decode or (isinstance(message, Gone) and message.meant_for == decode):
            self._on_message(envelope.sender, message)
        else:
            log.debug("%s speaks at the address of %s; ignored", envelope.sender, decode)
