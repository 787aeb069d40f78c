"""Units over UCX, the receiving end: who says hello, and their lanes (see `ucx_lane`)."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvtransfer.transport import TransferStats, UnitSink
from kvtransfer.ucx_lane import (
    HELLO_TAG,
    MAX_HELLO_BYTES,
    NAME,
    PASS_BYTES,
    unpack_hello,
    url_of,
)
from kvtransfer.ucx_receiver_lane import Desk, ReceiverLane
from kvtransfer.ucx_worker import ANY_TAG, DrivenWorker, array, load, new_context, settings
from wire.errors import MalformedMessage, VersionMismatch
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

_MAX_LANES = 1024


class UcxUnitReceiver:
    """The door of a decode node: a lane for everyone who says hello with its pass.

    Args:
        stall_s: a prefill node that stops in the middle of a unit for so long loses its lane.
        options: what UCX is told; see `settings`. Its devices say who can get here at all.

    Raises:
        ConfigError: UCX is not available.
    """

    def __init__(
        self,
        me: NodeId,
        sink: UnitSink,
        stats: TransferStats,
        *,
        stall_s: float = 30.0,
        options: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = Desk(me, secrets.token_bytes(PASS_BYTES), sink, stats, stall_s, clock)
        self._lanes: set[ReceiverLane] = set()
        self._received: list[tuple[Any, Any]] = []  # requests that are not over, and their memory
        self._context = new_context(settings() if options is None else options)
        self._driver = DrivenWorker(self._context, self._look, lambda: None)
        self.address = TransportAddress(NAME, url_of(self._driver.address, self._desk.password))

    def close(self) -> None:
        for lane in list(self._lanes):
            lane.close()
        self._received.clear()
        self._driver.close()

    def _look(self) -> bool:
        self._received = [item for item in self._received if not item[0].completed]
        found = self._driver.probe(ANY_TAG, 0)
        if found is None:
            return False
        tag, num_bytes = found
        if tag == HELLO_TAG and num_bytes <= MAX_HELLO_BYTES:
            self._take_hello(num_bytes)
        else:
            self._receive(bytearray(1), tag)
            self._desk.count_malformed(f"{num_bytes} bytes at the door, which are no hello")
        return True

    def _receive(self, into: bytearray, tag: int) -> bool:
        """Receive the next message of this tag; False if it is not there yet."""
        held = array(into)
        request = self._driver.receive(held, tag)
        if not request.completed:
            self._received.append((request, held))
        return bool(request.completed)

    def _take_hello(self, num_bytes: int) -> None:
        hello = bytearray(max(1, num_bytes))
        try:
            if not self._receive(hello, HELLO_TAG):  # nobody of ours sends hellos in pieces
                raise MalformedMessage("a hello in pieces")
            greeting, way_back = unpack_hello(bytes(hello), self._desk.password)
        except (MalformedMessage, VersionMismatch) as error:
            self._desk.count_malformed(str(error))
            return
        if greeting.receiver != self._desk.me:
            self._desk.stats.units_dropped["stale"] += 1
        elif len(self._lanes) < _MAX_LANES:
            self._open_lane(greeting.sender, way_back)

    def _open_lane(self, sender: NodeId, way_back: bytes) -> None:
        try:
            lane = ReceiverLane(self._context, sender, way_back, self._desk, self._lanes.discard)
        except load().UCXError as error:
            log.warning("a prefill node cannot be reached by ucx: %s", error)
        else:
            self._lanes.add(lane)
