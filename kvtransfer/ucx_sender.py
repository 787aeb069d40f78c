"""Units over UCX, the sending end: one lane per decode node (the picture is in `ucx_lane`)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtransfer.ucx_lane import (
    LAST_TURNS_S,
    MAGIC,
    POSTED_BYTES,
    WELCOME_BYTES,
    WELCOME_TAG,
    header_tag,
    parse,
    payload_tag,
)
from kvtransfer.ucx_worker import DrivenWorker, array, load, new_context, settings
from wire.codec import Envelope, encode
from wire.errors import ConfigError, TransferError
from wire.messages import UnitHeader
from wire.types import NodeId

log = logging.getLogger(__name__)

_IDLE_S = 300.0  # a lane unused for so long is closed when another one is opened
_RETRY_S = 1.0  # for so long a lost receiver is not tried again


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
        host, port = parse(url)
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
        patience = time.monotonic() + LAST_TURNS_S
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
        found = self._driver.probe(WELCOME_TAG)
        if found is None:
            return False
        welcome = bytearray(WELCOME_BYTES)
        request = self._driver.receive(array(welcome), WELCOME_TAG)
        if not (request.completed and found[1] == WELCOME_BYTES and welcome.startswith(MAGIC)):
            self.lose("is no decode node of this version")
            return False
        self._key = int.from_bytes(welcome[len(MAGIC) :], "little")
        return True

    def _post(self) -> bool:
        posted = False
        while self._waiting and (
            not self._posted or self._posted_bytes + self._waiting[0].num_bytes <= POSTED_BYTES
        ):
            assert self._key is not None, "not welcomed yet"
            send = self._waiting.popleft()
            self._posted.append(send)
            self._posted_bytes += send.num_bytes
            send.requests = (
                self._driver.send(self._endpoint, send.header, header_tag(self._key)),
                self._driver.send(self._endpoint, send.payload, payload_tag(self._key)),
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
