"""Units over UCX, the sending end: one lane per decode node (the picture is in `ucx_lane`)."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from kvtransfer.transport import OnLost
from kvtransfer.ucx_lane import (
    HELLO_TAG,
    KEY_BYTES,
    LAST_TURNS_S,
    MAGIC,
    MAX_HEADERS,
    NAME,
    POSTED_BYTES,
    WELCOME_TAG,
    header_tag,
    pack_headers,
    pack_hello,
    parse,
    payload_tag,
)
from kvtransfer.ucx_payload import Payload, Send, take_payload
from kvtransfer.ucx_worker import DrivenWorker, array, load, new_context, settings
from wire.errors import ConfigError, TransferError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

_IDLE_S = 300.0  # a lane unused for so long is closed when another one is opened
_RETRY_S = 1.0  # for so long a lost receiver is not tried again


class _SenderLane:
    """The way to one decode node, on a UCX worker of its own: its end ends everything on it."""

    def __init__(
        self,
        me: NodeId,
        to: NodeId,
        url: str,
        context: Any,
        stall_s: float,
        clock: Callable[[], float],
        on_lost: Callable[[str, str], None],
    ) -> None:
        there, self._pass = parse(url)
        self.url = url
        self.lost = False
        self.moved_at = clock()  # when a send ended, or the first one began
        self.retry_at = clock()  # when lost with sends under way: not before
        self._stall_s = stall_s
        self._clock = clock
        self._on_lost = on_lost
        self._key: int | None = None  # once welcomed
        self._waiting: deque[Send] = deque()
        self._posted: deque[Payload] = deque()
        self._posted_bytes = 0
        self._driver = DrivenWorker(context, self._look, self._tick)
        try:
            self._door = self._endpoint = self._driver.connect(there)
        except load().UCXError:
            self._driver.close()
            raise
        hello = array(pack_hello(me, to, self._pass, self._driver.address))
        self._hello: tuple[Any, Any] | None = (
            hello,
            self._driver.send(self._door, hello, HELLO_TAG),
        )

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._posted)

    @property
    def reading(self) -> bool:
        """Whether UCX may still read what it was given."""
        return bool(self._posted) or (self._hello is not None and not self._hello[1].completed)

    def send(self, send: Send) -> None:
        if not self.busy:
            self.moved_at = self._clock()
        self._waiting.append(send)
        self._driver.wake()

    def fail(self, reason: str) -> None:
        """End the lane because it does not work, and say so."""
        if self.lost:
            return
        if self.busy:
            log.warning("a decode node %s; dropped %d units", reason, self._count())
            self.retry_at = self._clock() + _RETRY_S
        self.lose()
        self._on_lost(self.url, reason)

    def lose(self) -> None:
        """Close the endpoint. What UCX still reads ends when it says so, the rest now."""
        if self.lost:
            return
        self.lost = True
        for endpoint in (self._endpoint, self._door):
            endpoint.close_blocking()
        self._driver.wake()
        while self._waiting:
            self._waiting.popleft().end()

    def close(self) -> None:
        """End everything, waiting a moment for UCX; then nobody drives it any more."""
        self.lose()
        patience = time.monotonic() + LAST_TURNS_S
        while self.reading and time.monotonic() < patience:
            self._driver.worker.progress()
            self._finish()
        while self._posted:  # the pool ends with sends under way
            self._posted.popleft().end()
        self._let_go()

    def _let_go(self) -> None:
        """End the worker: that is what the other side notices."""
        self._driver.close()
        self._endpoint = self._door = self._hello = None

    def _look(self) -> bool:
        self._finish()
        if self.lost:
            if not self.reading:
                self._let_go()
            return False
        if not self._endpoint.alive:
            self.fail("is gone")
            return True
        if self._key is None and not self._welcomed():
            return False
        return self._post()

    def _finish(self) -> None:
        """Let go of what has left, oldest first: a lane's messages leave in order."""
        while self._posted and self._posted[0].done:
            payload = self._posted.popleft()
            self._posted_bytes -= payload.num_bytes
            self.moved_at = self._clock()
            payload.end()

    def _welcomed(self) -> bool:
        found = self._driver.probe(WELCOME_TAG)
        if found is None:
            return False
        welcome = bytearray(found[1])
        request = self._driver.receive(array(welcome), WELCOME_TAG)
        begin = MAGIC + self._pass
        key_end = len(begin) + KEY_BYTES
        if not (request.completed and welcome.startswith(begin) and len(welcome) > key_end):
            self.fail("answers in another version")
            return False
        try:
            self._endpoint = self._driver.connect(bytes(welcome[key_end:]))
        except load().UCXError:
            self.fail("cannot be reached")
            return False
        self._key = int.from_bytes(welcome[len(begin) : key_end], "little")
        return True

    def _post(self) -> bool:
        """Give UCX the next payloads, their headers in one message."""
        batch = self._take_batch()
        if not batch:
            return False
        self._posted.extend(batch)
        try:
            self._give(batch)
        except load().UCXError:  # those that UCX did not take are over
            self.fail("is gone")
        return True

    def _give(self, batch: list[Payload]) -> None:
        assert self._key is not None, "not welcomed yet"
        headers = array(pack_headers([payload.header for payload in batch]))
        sent = self._driver.send(self._endpoint, headers, header_tag(self._key))
        batch[0].headers = (headers, sent)
        for payload in batch:
            payload.request = self._driver.send(
                self._endpoint, payload.data, payload_tag(self._key)
            )

    def _take_batch(self) -> list[Payload]:
        """As many as UCX may have now, or a few more units; one alone may be of any size.

        None before half of what it had has left: then their headers are few messages.
        """
        batch: list[Payload] = []
        if self._posted_bytes > POSTED_BYTES // 2:
            return batch
        while self._waiting and len(batch) < MAX_HEADERS:
            num_bytes = self._waiting[0].num_bytes
            if self._posted_bytes and self._posted_bytes + num_bytes > POSTED_BYTES:
                break
            batch.append(take_payload(self._waiting))
            self._posted_bytes += batch[-1].num_bytes
        return batch

    def _tick(self) -> None:
        if self.busy and self._clock() - self.moved_at >= self._stall_s:
            self.fail("takes no units")

    def _count(self) -> int:
        return len(self._waiting) + sum(len(payload.sends) for payload in self._posted)


class UcxUnitSender:
    """One lane per decode node.

    Args:
        on_lost: told when a lane ended by itself. What was sent on it may not have arrived, also
            where UCX had taken it.
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
        on_lost: OnLost | None = None,
        stall_s: float = 30.0,
        options: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = me
        self._on_lost = on_lost
        self._context = new_context(settings() if options is None else options)
        self._stall_s = stall_s
        self._clock = clock
        self._lanes: dict[str, _SenderLane] = {}
        self._ending: list[_SenderLane] = []  # lost, and UCX still reads for them

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender. Begins to connect; what comes of it shows in the sends."""
        was_reached = url in self._lanes
        try:
            self._lane(url, to)
        except TransferError as error:
            unreachable = isinstance(error.__cause__, load().UCXUnreachableError)
            if was_reached or not unreachable:
                raise
            return False  # another host's loopback, or a network that this node is not in
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
        self._lane(url, to).send(Send(header, payload, on_done))

    def close_peer(self, url: str) -> None:
        """Let nothing more reach the decode node at `url`, and get the blocks back."""
        if lane := self._lanes.pop(url, None):
            lane.lose()
            self._ending.append(lane)

    def close(self) -> None:
        for lane in (*self._lanes.values(), *self._ending):
            lane.close()
        self._lanes.clear()
        self._ending.clear()

    def _lane(self, url: str, to: NodeId) -> _SenderLane:
        lane = self._lanes.get(url)
        if lane is None:
            return self._open(url, to)
        if not lane.lost:
            return lane
        if self._clock() < lane.retry_at:
            raise TransferError("transport", "a decode node was lost by ucx a moment ago")
        self.close_peer(url)
        return self._open(url, to)

    def _open(self, url: str, to: NodeId) -> _SenderLane:
        self._close_unused()
        try:
            self._lanes[url] = lane = _SenderLane(
                self._me, to, url, self._context, self._stall_s, self._clock, self._lost
            )
        except (ConfigError, load().UCXError) as error:
            raise TransferError("transport", f"cannot send by ucx: {error}") from error
        return lane

    def _close_unused(self) -> None:
        """A restarted decode node has another address: lanes to old ones must not pile up."""
        now = self._clock()
        self._ending = [lane for lane in self._ending if lane.reading]
        for url, lane in list(self._lanes.items()):
            is_over = lane.lost and now >= lane.retry_at
            if not lane.busy and (is_over or now - lane.moved_at > _IDLE_S):
                self._lanes.pop(url).close()

    def _lost(self, url: str, reason: str) -> None:
        error = TransferError("transport", f"a decode node {reason} (ucx)")
        if self._on_lost:
            self._on_lost(TransportAddress(NAME, url), error)
