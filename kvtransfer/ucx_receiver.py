"""Units over UCX, the receiving end (the picture is in `ucx_lane`)."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.transport import Landing, TransferStats, UnitSink
from kvtransfer.ucx_lane import (
    LAST_TURNS_S,
    MAGIC,
    NAME,
    POSTED_BYTES,
    WELCOME_TAG,
    header_tag,
    payload_tag,
    url_of,
)
from kvtransfer.ucx_worker import (
    ANY_TAG,
    EVERY_BIT,
    DrivenWorker,
    array,
    load,
    new_context,
    settings,
    succeeded,
)
from wire.codec import decode
from wire.errors import ConfigError, MalformedMessage, VersionMismatch
from wire.messages import UnitHeader
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

_MAX_HEADER_BYTES = 4096
_MAX_LANES = 1024
_BURST = 64  # messages of a lane before UCX and the other lanes get their turn


@dataclass(slots=True)
class _Receive:
    """One unit on its way into its block; it cannot be revoked."""

    request: Any
    into: Any  # keeps the memory alive
    landing: Landing
    num_bytes: int

    def end(self) -> None:
        try:
            self.landing.end(self.num_bytes if succeeded(self.request) else 0)
        except Exception:  # a bug there must not keep the other blocks from being let go of
            log.exception("a unit's landing failed")


@dataclass(slots=True, eq=False)
class _ReceiverLane:
    """One connection of a prefill node."""

    endpoint: Any
    key: int
    moved_at: float
    welcome: tuple[Any, ...] = ()  # its buffer and its request
    header: tuple[NodeId, UnitHeader] | None = None  # of the payload that comes next
    expects_payload: bool = False
    receives: list[_Receive] = field(default_factory=list)
    posted_bytes: int = 0

    @property
    def full(self) -> bool:
        return self.posted_bytes >= POSTED_BYTES


class UcxUnitReceiver:
    """The listener of a decode node, and a lane for everyone who connects.

    Args:
        host: the numeric address that prefill nodes are told. Which interfaces carry data is
            decided by the `net_devices` of `settings`.
        port: 0 for any.
        stall_s: a prefill node that stops in the middle of a unit for so long loses its lane.
        options: what UCX is told; see `settings`.

    Raises:
        ConfigError: UCX is not available, or cannot listen there.
    """

    def __init__(
        self,
        me: NodeId,
        sink: UnitSink,
        stats: TransferStats,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        stall_s: float = 30.0,
        options: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._sink = sink
        self._stats = stats
        self._stall_s = stall_s
        self._clock = clock
        self._lanes: dict[int, _ReceiverLane] = {}
        self._ending: list[_ReceiverLane] = []  # closed, and UCX may still write for them
        self._dropped: list[tuple[Any, Any]] = []  # receives into nothing, and the nothing
        context = new_context(settings() if options is None else options)
        self._driver = DrivenWorker(context, self._look, self._tick)
        try:
            self._listener = load().UCXListener.create(self._driver.worker, port, self._connected)
            self.address = TransportAddress(NAME, url_of(host, self._listener.port))
        except (load().UCXError, RuntimeError, ValueError) as error:
            self._driver.close()
            raise ConfigError(f"the ucx transport cannot listen on port {port}: {error}") from error

    def close(self) -> None:
        if self._listener is None:
            return
        for lane in list(self._lanes.values()):
            self._close_lane(lane)
        patience = time.monotonic() + LAST_TURNS_S
        while (self._ending or self._dropped) and time.monotonic() < patience:
            self._driver.worker.progress()
            self._finish()
        self._listener = None
        self._driver.close()

    # ------------------------------------------------------------ lanes

    def _connected(self, request: int) -> None:
        """UCX calls this while it works, so it must not be made to work here."""
        endpoint = self._listener.create_endpoint_from_conn_request(
            request, endpoint_error_handling=True
        )
        key = secrets.randbits(62) + 1
        self._lanes[key] = _ReceiverLane(endpoint, key, self._clock())

    def _welcome(self, lane: _ReceiverLane) -> None:
        if len(self._lanes) > _MAX_LANES:
            self._close_lane(lane)
            return
        data = array(MAGIC + lane.key.to_bytes(8, "little"))
        lane.welcome = (data, self._driver.send(lane.endpoint, data, WELCOME_TAG))

    def _close_lane(self, lane: _ReceiverLane) -> None:
        del self._lanes[lane.key]
        lane.endpoint.close_blocking()
        self._ending.append(lane)
        self._driver.wake()

    def _tick(self) -> None:
        now = self._clock()
        for lane in list(self._lanes.values()):
            if lane.receives and now - lane.moved_at >= self._stall_s:
                log.warning("a prefill node stopped within %d units", len(lane.receives))
                self._close_lane(lane)

    # ------------------------------------------------------------ units

    def _look(self) -> bool:
        self._finish()
        posted = False
        for lane in list(self._lanes.values()):
            if not lane.endpoint.alive:
                self._close_lane(lane)
                posted = True
            elif not lane.welcome:
                self._welcome(lane)
                posted = True
            else:
                posted |= self._read(lane)
        if posted or any(lane.full for lane in self._lanes.values()):
            return posted
        return self._drop_strays()

    def _read(self, lane: _ReceiverLane) -> bool:
        """Take what has arrived on this lane, as far as it may be posted now."""
        for taken in range(_BURST):
            found = None if lane.full else self._driver.probe(lane.key << 1, EVERY_BIT - 1)
            if found is None:
                return taken > 0
            tag, num_bytes = found
            if tag == header_tag(lane.key):
                self._take_header(lane, num_bytes)
            else:
                self._take_payload(lane, num_bytes)
        return True

    def _take_header(self, lane: _ReceiverLane, num_bytes: int) -> None:
        if lane.expects_payload:
            self._malformed("a header where a payload should be")
        lane.expects_payload = True
        lane.header = None
        if num_bytes > _MAX_HEADER_BYTES:
            self._drop(header_tag(lane.key))
            self._malformed(f"a header of {num_bytes} bytes")
            return
        head = bytearray(max(1, num_bytes))
        into = array(head)
        request = self._driver.receive(into, header_tag(lane.key))
        if request.completed:
            lane.header = self._open(memoryview(head)[:num_bytes])
        else:  # nobody of ours sends headers in pieces
            self._dropped.append((request, into))
            self._malformed("a header in pieces")

    def _take_payload(self, lane: _ReceiverLane, num_bytes: int) -> None:
        tag = payload_tag(lane.key)
        if not lane.expects_payload:
            self._malformed("a payload without a header")
        header, lane.header, lane.expects_payload = lane.header, None, False
        try:
            landing = self._sink.begin(*header) if header else None
        except Exception:
            self._drop(tag)
            raise
        if landing is None:
            self._drop(tag)
        elif len(landing.view) != num_bytes:
            self._drop(tag)
            landing.end(num_bytes)
        else:
            into = array(landing.view)
            receive = _Receive(self._driver.receive(into, tag), into, landing, num_bytes)
            if receive.request.completed:  # a small one was all there
                receive.end()
                return
            if not lane.receives:
                lane.moved_at = self._clock()
            lane.receives.append(receive)
            lane.posted_bytes += num_bytes

    def _finish(self) -> None:
        """Hand over every unit that is completely there, or will never be."""
        for lane in (*self._lanes.values(), *self._ending):
            done = [receive for receive in lane.receives if receive.request.completed]
            if done:
                lane.receives = [x for x in lane.receives if not x.request.completed]
                lane.posted_bytes = sum(receive.num_bytes for receive in lane.receives)
                lane.moved_at = self._clock()
            for receive in done:
                receive.end()
        self._ending = [lane for lane in self._ending if lane.receives]
        self._dropped = [item for item in self._dropped if not item[0].completed]

    def _drop(self, tag: int) -> None:
        """Receive the next message of this tag into nothing; of a large one nothing travels."""
        nothing = array(bytearray(1))
        self._dropped.append((self._driver.receive(nothing, tag), nothing))

    def _drop_strays(self) -> bool:
        """What no lane wants would stay in UCX's queue: its lane is closed, or never was."""
        found = False
        while stray := self._driver.probe(ANY_TAG, 0):
            self._drop(stray[0])
            found = True
        return found

    def _open(self, head: memoryview) -> tuple[NodeId, UnitHeader] | None:
        try:
            envelope = decode(head)
        except (MalformedMessage, VersionMismatch) as error:
            self._malformed(str(error))
            return None
        if envelope.receiver != self._me or not isinstance(envelope.message, UnitHeader):
            self._stats.units_dropped["stale"] += 1
            return None
        return envelope.sender, envelope.message

    def _malformed(self, what: str) -> None:
        self._stats.units_dropped["malformed"] += 1
        if self._stats.units_dropped["malformed"] == 1:
            log.warning("dropped a malformed unit: %s", what[:500])
