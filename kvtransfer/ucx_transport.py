"""Units over UCX: tagged messages, received in place, between two processes that both consent.

    prefill                      decode
      │ connect ────────────────▶ │ an endpoint and a random key for it: a lane
      │ ◀──────────────── welcome │ [magic | key]
      │ [header] ───────────────▶ │ tag = key, 0
      │ [payload] ──────────────▶ │ tag = key, 1: found by a probe, then the sink is asked,
      │                           │ then received into its block, or into nothing

The key is the receiver's, random per lane, and says which endpoint a message came over; messages
of one lane arrive in order. No receive is ever posted ahead of its message. One that is posted
cannot be revoked: its block is let go of when it completes, and closing the endpoint forces that.

Payloads are host memory. CUDA memory needs a `BlockMemory` and a `Landing` that give out arrays
with `__cuda_array_interface__` instead of memoryviews, and a UCX built for it; nothing here reads
or copies the bytes.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.transport import Landing, TransferStats, UnitSink
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
from wire.codec import Envelope, decode, encode
from wire.errors import ConfigError, MalformedMessage, TransferError, VersionMismatch
from wire.messages import UnitHeader
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

NAME = "ucx"
_WELCOME_TAG = 0  # on the sender's own worker of the lane
_MAGIC = b"baton/1\n"
_WELCOME_BYTES = 16
_MAX_HEADER_BYTES = 4096
_MAX_LANES = 1024
_POSTED_BYTES = 4 << 20  # per lane, given to UCX at a time; bounds how long one turn takes
_BURST = 64  # messages of a lane before UCX and the other lanes get their turn
_IDLE_S = 300.0  # a lane unused for so long is closed when another one is opened
_RETRY_S = 1.0  # for so long a lost receiver is not tried again
_LAST_TURNS_S = 1.0  # how long `close` waits for UCX to let go of the pool's memory


# -------------------------------------------------------------------- the sending end


@dataclass(slots=True)
class _Send:
    """One unit: what UCX reads, and whom to tell when it does not any more."""

    header: Any
    payload: Any
    on_done: Callable[[], None]
    requests: tuple[Any, ...] = ()

    @property
    def num_bytes(self) -> int:
        return int(self.payload.nbytes)

    @property
    def done(self) -> bool:
        return all(request.completed for request in self.requests)

    def end(self) -> None:
        try:
            self.on_done()
        except Exception:  # a bug there must not keep the other blocks from being let go of
            log.exception("the end of a send was not handled")


class _SenderLane:
    """The way to one decode node, on a UCX worker of its own: its end ends everything on it."""

    def __init__(self, url: str, context: Any, stall_s: float, clock: Callable[[], float]) -> None:
        host, port = _parse(url)
        self.url = url
        self.lost = False
        self.moved_at = clock()  # when a send ended, or the first one began
        self.retry_at = clock()  # when lost with sends under way: not before
        self._stall_s = stall_s
        self._clock = clock
        self._key: int | None = None  # once welcomed
        self._waiting: deque[_Send] = deque()
        self._posted: deque[_Send] = deque()
        self._posted_bytes = 0
        self._driver = DrivenWorker(context, self._look, self._tick)
        try:
            self._endpoint = self._driver.worker.create_endpoint_from_hostname(
                host, port, endpoint_error_handling=True
            )
        except load().UCXError:
            self._driver.close()
            raise

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._posted)

    def send(self, send: _Send) -> None:
        if not self.busy:
            self.moved_at = self._clock()
        self._waiting.append(send)
        self._driver.wake()

    def lose(self, reason: str) -> None:
        """Close the endpoint. What UCX still reads ends when it says so, the rest now."""
        if self.lost:
            return
        self.lost = True
        if self.busy:
            log.warning("%s %s; dropped %d units", self.url, reason, self._count())
            self.retry_at = self._clock() + _RETRY_S
        self._endpoint.close_blocking()
        self._driver.wake()
        while self._waiting:
            self._waiting.popleft().end()

    def close(self) -> None:
        """End everything, waiting a moment for UCX; then nobody drives it any more."""
        self.lose("was closed")
        patience = time.monotonic() + _LAST_TURNS_S
        while self._posted and time.monotonic() < patience:
            self._driver.worker.progress()
            self._finish()
        while self._posted:  # the pool ends with sends under way
            self._posted.popleft().end()
        self._driver.close()

    def _look(self) -> bool:
        self._finish()
        if self.lost:
            if not self._posted:
                self._driver.close()
            return False
        if not self._endpoint.alive:
            self.lose("is gone")
            return True
        if self._key is None and not self._welcomed():
            return False
        return self._post()

    def _finish(self) -> None:
        """Let go of what has left, oldest first: a lane's messages leave in order."""
        while self._posted and self._posted[0].done:
            send = self._posted.popleft()
            self._posted_bytes -= send.num_bytes
            self.moved_at = self._clock()
            send.end()

    def _welcomed(self) -> bool:
        found = self._driver.probe(_WELCOME_TAG)
        if found is None:
            return False
        welcome = bytearray(_WELCOME_BYTES)
        request = self._driver.receive(array(welcome), _WELCOME_TAG)
        if not (request.completed and found[1] == _WELCOME_BYTES and welcome.startswith(_MAGIC)):
            self.lose("is no decode node of this version")
            return False
        self._key = int.from_bytes(welcome[len(_MAGIC) :], "little")
        return True

    def _post(self) -> bool:
        posted = False
        while self._waiting and (
            not self._posted or self._posted_bytes + self._waiting[0].num_bytes <= _POSTED_BYTES
        ):
            assert self._key is not None, "not welcomed yet"
            send = self._waiting.popleft()
            self._posted.append(send)
            self._posted_bytes += send.num_bytes
            send.requests = (
                self._driver.send(self._endpoint, send.header, _header_tag(self._key)),
                self._driver.send(self._endpoint, send.payload, _payload_tag(self._key)),
            )
            posted = True
        return posted

    def _tick(self) -> None:
        if self.busy and self._clock() - self.moved_at >= self._stall_s:
            self.lose("takes no units")

    def _count(self) -> int:
        return len(self._waiting) + len(self._posted)


class UcxUnitSender:
    """One lane per decode node.

    Args:
        stall_s: a decode node that takes no unit for so long loses its lane: a send cannot be
            revoked, and closing the endpoint is the only way to get the blocks back.
        options: what UCX is told; see `settings`.

    Raises:
        ConfigError: UCX is not available.
    """

    def __init__(
        self,
        me: NodeId,
        *,
        stall_s: float = 30.0,
        options: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._context = new_context(settings() if options is None else options)
        self._stall_s = stall_s
        self._clock = clock
        self._lanes: dict[str, _SenderLane] = {}
        self._ending: list[_SenderLane] = []  # lost, and UCX still reads for them

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender. Begins to connect; what comes of it shows in the sends."""
        self._lane(url)
        return True

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        """See UnitSender."""
        lane = self._lane(url)
        head = array(encode(Envelope(self._me, to, header)))
        lane.send(_Send(head, array(payload), on_done))

    def close_peer(self, url: str) -> None:
        """Let nothing more reach the decode node at `url`, and get the blocks back."""
        if lane := self._lanes.pop(url, None):
            lane.lose("was closed")
            self._ending.append(lane)

    def close(self) -> None:
        for lane in (*self._lanes.values(), *self._ending):
            lane.close()
        self._lanes.clear()
        self._ending.clear()

    def _lane(self, url: str) -> _SenderLane:
        lane = self._lanes.get(url)
        if lane is None:
            return self._open(url)
        if not lane.lost:
            return lane
        if self._clock() < lane.retry_at:
            raise TransferError("transport", f"cannot send to {url}: it was lost a moment ago")
        self.close_peer(url)
        return self._open(url)

    def _open(self, url: str) -> _SenderLane:
        now = self._clock()
        self._ending = [lane for lane in self._ending if lane.busy]
        for other, lane in list(self._lanes.items()):
            if not lane.busy and now - lane.moved_at > _IDLE_S:
                self._lanes.pop(other).close()
        try:
            self._lanes[url] = lane = _SenderLane(url, self._context, self._stall_s, self._clock)
        except (ConfigError, load().UCXError) as error:
            raise TransferError("transport", f"cannot send to {url}: {error}") from error
        return lane


# -------------------------------------------------------------------- the receiving end


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
        return self.posted_bytes >= _POSTED_BYTES


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
            self.address = TransportAddress(NAME, _url(host, self._listener.port))
        except (load().UCXError, RuntimeError, ConfigError) as error:
            self._driver.close()
            raise ConfigError(f"the ucx transport cannot listen on port {port}: {error}") from error

    def close(self) -> None:
        if self._listener is None:
            return
        for lane in list(self._lanes.values()):
            self._close_lane(lane)
        patience = time.monotonic() + _LAST_TURNS_S
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
        data = array(_MAGIC + lane.key.to_bytes(8, "little"))
        lane.welcome = (data, self._driver.send(lane.endpoint, data, _WELCOME_TAG))

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
            if tag == _header_tag(lane.key):
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
            self._drop(_header_tag(lane.key))
            self._malformed(f"a header of {num_bytes} bytes")
            return
        head = bytearray(max(1, num_bytes))
        into = array(head)
        request = self._driver.receive(into, _header_tag(lane.key))
        if request.completed:
            lane.header = self._open(memoryview(head)[:num_bytes])
        else:  # nobody of ours sends headers in pieces
            self._dropped.append((request, into))
            self._malformed("a header in pieces")

    def _take_payload(self, lane: _ReceiverLane, num_bytes: int) -> None:
        tag = _payload_tag(lane.key)
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


# -------------------------------------------------------------------- names


def _header_tag(key: int) -> int:
    return key << 1


def _payload_tag(key: int) -> int:
    return key << 1 | 1


def _url(host: str, port: int) -> str:
    address = ipaddress.ip_address(host)
    return f"ucx://[{host}]:{port}" if address.version == 6 else f"ucx://{host}:{port}"


def _parse(url: str) -> tuple[str, int]:
    """Host and port of `ucx://host:port`; the host is numeric, because looking it up would block.

    Raises:
        ConfigError: it is no such address.
    """
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    with suppress(ValueError):
        if scheme == NAME and 0 < int(port) <= 0xFFFF:
            return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    raise ConfigError(f"{url!r} is not ucx://<numeric address>:<port>")
