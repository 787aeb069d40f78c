"""What a lane gives UCX to send: one unit, or several that lie one behind the other in one block.

Each message costs a post, a probe, a receive and two handshakes, as much as copying 100 KB. The
layer groups of a block lie one behind the other at both ends, and travel as one message where they
wait for their turn together.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.ucx_lane import JOINED_BYTES, MAX_JOINED
from kvtransfer.ucx_worker import array
from wire.handoff_messages import UnitHeader

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Send:
    """One unit, and whom to tell when UCX does not read it any more."""

    header: UnitHeader
    view: memoryview
    on_done: Callable[[], None]
    data: Any = field(init=False)  # `view` as UCX takes it

    def __post_init__(self) -> None:
        self.data = array(self.view)

    @property
    def num_bytes(self) -> int:
        return int(self.data.nbytes)

    def follows(self, other: Send) -> bool:
        """Whether it lies right behind the other one, in the same block at either end."""
        ours, theirs = self.header, other.header
        return (
            ours.unit == theirs.unit + 1
            and ours.handle == theirs.handle
            and ours.lease == theirs.lease
            and ours.capability == theirs.capability
            and isinstance(self.view, memoryview)  # CUDA memory is not
            and isinstance(other.view, memoryview)
            and self.view.obj is other.view.obj
            and bool(self.data.ptr == other.data.ptr + other.num_bytes)
        )

    def end(self) -> None:
        try:
            self.on_done()
        except Exception:  # a bug there must not keep the other blocks from being let go of
            log.exception("the end of a send was not handled")


@dataclass(slots=True)
class Payload:
    """One message: what UCX reads. Its units end together."""

    sends: list[Send]
    data: Any
    request: Any = None
    headers: tuple[Any, Any] | None = None  # sent before it, for it and others: memory and request

    @property
    def header(self) -> tuple[UnitHeader, int]:
        return self.sends[0].header, len(self.sends)

    @property
    def num_bytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def done(self) -> bool:
        sent_headers = self.headers is None or self.headers[1].completed
        return bool(sent_headers and (self.request is None or self.request.completed))

    def end(self) -> None:
        for send in self.sends:
            send.end()


def take_payload(waiting: deque[Send]) -> Payload:
    """The first one that waits, and those behind it that can travel with it."""
    sends = [waiting.popleft()]
    num_bytes = sends[0].num_bytes
    while waiting and len(sends) < MAX_JOINED and waiting[0].follows(sends[-1]):
        num_bytes += waiting[0].num_bytes
        if num_bytes > JOINED_BYTES:
            break
        sends.append(waiting.popleft())
    return Payload(sends, _joined(sends))


def _joined(sends: list[Send]) -> Any:
    """The memory from the first one's beginning to the last one's end."""
    first, last = sends[0].data, sends[-1].data
    if first is last:
        return first
    whole = memoryview(sends[0].view.obj).cast("B")
    start = first.ptr - array(whole).ptr
    return array(whole[start : start + last.ptr - first.ptr + last.nbytes])
