"""One prefill node's lane into a decode node (the picture is in `ucx_lane`)."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvtransfer.transport import Landing, TransferStats, UnitSink
from kvtransfer.ucx_lane import (
    KEY_BYTES,
    LAST_TURNS_S,
    MAGIC,
    POSTED_BYTES,
    WELCOME_TAG,
    header_tag,
    payload_tag,
    unpack_headers,
)
from kvtransfer.ucx_worker import ANY_TAG, EVERY_BIT, DrivenWorker, array, load, succeeded
from wire.errors import MalformedMessage
from wire.handoff_messages import UnitHeader
from wire.types import NodeId

log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 16384
_BURST = 64  # messages before UCX gets its turn


@dataclass(frozen=True, slots=True)
class Desk:
    """What all lanes of a decode node share."""

    me: NodeId
    password: bytes
    sink: UnitSink
    stats: TransferStats
    stall_s: float
    clock: Callable[[], float]

    def count_malformed(self, what: str) -> None:
        self.stats.units_dropped["malformed"] += 1
        if self.stats.units_dropped["malformed"] == 1:
            log.warning("dropped a malformed unit: %s", what[:500])


@dataclass(slots=True)
class _Receive:
    """One payload on its way into its block; it cannot be revoked."""

    request: Any
    into: Any  # keeps the memory alive
    landing: Landing
    num_bytes: int

    def end(self) -> None:
        try:
            self.landing.end(self.num_bytes if succeeded(self.request) else 0)
        except Exception:  # a bug there must not keep the other blocks from being let go of
            log.exception("a unit's landing failed")


class ReceiverLane:
    """A worker of its own: when it ends, everything on it does, and the sender sees that at once.

    Args:
        way_back: the address of the sender's worker; it must come from UCX.
        on_ended: called once, when the lane is over and nothing can write for it any more.

    Raises:
        UCXError: no device leads back.
    """

    def __init__(
        self,
        context: Any,
        sender: NodeId,
        way_back: bytes,
        desk: Desk,
        on_ended: Callable[[ReceiverLane], None],
    ) -> None:
        self._sender = sender
        self._desk = desk
        self._on_ended = on_ended
        self._key = secrets.randbits(62) + 1
        self._moved_at = desk.clock()
        self._headers: deque[tuple[UnitHeader, int] | None] = deque()  # of the payloads to come
        self._receives: list[_Receive] = []
        self._posted_bytes = 0
        self._dropped: list[tuple[Any, Any]] = []  # receives into nothing, and the nothing
        self._closing = False
        self._driver = DrivenWorker(context, self._look, self._tick)
        try:
            self._endpoint = self._driver.connect(way_back)
        except load().UCXError:
            self._driver.close()
            raise
        key = self._key.to_bytes(KEY_BYTES, "little")
        welcome = array(MAGIC + desk.password + key + self._driver.address)
        self._welcome = (welcome, self._driver.send(self._endpoint, welcome, WELCOME_TAG))

    def close(self) -> None:
        """End everything, waiting a moment for UCX."""
        self._begin_to_close()
        patience = time.monotonic() + LAST_TURNS_S
        while not self._driver.closed and time.monotonic() < patience:
            self._driver.worker.progress()
            self._look()
        self._driver.close()

    # ------------------------------------------------------------ the lane's end

    def _begin_to_close(self) -> None:
        """Close the endpoint: what is posted ends now, or when its bytes are there."""
        if not self._closing:
            self._closing = True
            self._endpoint.close_blocking()
            self._driver.wake()

    def _end_if_quiet(self) -> None:
        if not self._receives and all(item[0].completed for item in self._dropped):
            self._driver.close()
            self._endpoint = None  # it holds the worker, and the worker its sockets
            self._on_ended(self)

    def _tick(self) -> None:
        if self._receives and self._desk.clock() - self._moved_at >= self._desk.stall_s:
            log.warning("a prefill node stopped within %d units", len(self._receives))
            self._begin_to_close()

    # ------------------------------------------------------------ units

    def _look(self) -> bool:
        self._finish()
        if self._closing:
            self._end_if_quiet()
            return False
        if not self._endpoint.alive:
            self._begin_to_close()
            return True
        return self._read() or (not self._full and self._drop_strays())

    @property
    def _full(self) -> bool:
        return self._posted_bytes >= POSTED_BYTES

    def _read(self) -> bool:
        """Take what has arrived, as far as it may be posted now."""
        for taken in range(_BURST):
            found = None if self._full else self._driver.probe(self._key << 1, EVERY_BIT - 1)
            if found is None:
                return taken > 0
            tag, num_bytes = found
            if tag == header_tag(self._key):
                self._take_headers(num_bytes)
            else:
                self._take_payload(num_bytes)
        return True

    def _take_headers(self, num_bytes: int) -> None:
        if self._headers:
            self._desk.count_malformed("a header where a payload should be")
            self._headers.clear()
        if num_bytes > _MAX_HEADER_BYTES:
            self._drop(header_tag(self._key))
            self._forgo(f"a header of {num_bytes} bytes")
            return
        head = bytearray(max(1, num_bytes))
        into = array(head)
        request = self._driver.receive(into, header_tag(self._key))
        if not request.completed:  # nobody of ours sends headers in pieces
            self._dropped.append((request, into))
            self._forgo("a header in pieces")
            return
        try:
            self._headers.extend(unpack_headers(bytes(head)))
        except MalformedMessage as error:
            self._forgo(str(error))

    def _forgo(self, what: str) -> None:
        """A header cannot be read: its payload is received into nothing."""
        self._desk.count_malformed(what)
        self._headers.append(None)

    def _take_payload(self, num_bytes: int) -> None:
        tag = payload_tag(self._key)
        if not self._headers:
            self._desk.count_malformed("a payload without a header")
            self._drop(tag)
            return
        header = self._headers.popleft()
        try:
            landing = self._desk.sink.begin(self._sender, *header) if header else None
        except Exception:
            self._drop(tag)
            raise
        if landing is None:
            self._drop(tag)
        elif len(landing.view) != num_bytes:
            self._drop(tag)
            landing.end(num_bytes)
        else:
            self._receive(landing, num_bytes)

    def _receive(self, landing: Landing, num_bytes: int) -> None:
        into = array(landing.view)
        request = self._driver.receive(into, payload_tag(self._key))
        receive = _Receive(request, into, landing, num_bytes)
        if request.completed:  # a small one was all there
            receive.end()
            return
        if not self._receives:
            self._moved_at = self._desk.clock()
        self._receives.append(receive)
        self._posted_bytes += num_bytes

    def _finish(self) -> None:
        """Hand over every unit that is completely there, or will never be."""
        done = [receive for receive in self._receives if receive.request.completed]
        if done:
            self._receives = [x for x in self._receives if not x.request.completed]
            self._posted_bytes = sum(receive.num_bytes for receive in self._receives)
            self._moved_at = self._desk.clock()
        for receive in done:
            receive.end()
        self._dropped = [item for item in self._dropped if not item[0].completed]

    def _drop(self, tag: int) -> None:
        """Receive the next message of this tag into nothing; of a large one nothing travels."""
        nothing = array(bytearray(1))
        self._dropped.append((self._driver.receive(nothing, tag), nothing))

    def _drop_strays(self) -> bool:
        """What has another tag would stay in UCX's queue."""
        found = False
        while stray := self._driver.probe(ANY_TAG, 0):
            self._drop(stray[0])
            found = True
        return found
