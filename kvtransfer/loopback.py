"""Units within one process, with faults on demand: for tests, and for both roles in one process.

A fault is a `Delivery` that differs from the default. The payload is read when it is delivered, not
when it is sent, as a zero-copy transport does: what the memory holds by then is what arrives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from kvtransfer.transport import UnitSink
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

NAME = "loopback"


@dataclass(frozen=True, slots=True)
class Delivery:
    """How one unit travels. Delays of different lengths reorder; a long one is a stall."""

    delay_s: float = 0.0
    copies: int = 1  # 0: lost, 2: duplicated
    truncate_to: int | None = None  # bytes that arrive
    flip_bit: int | None = None  # position of a bit that arrives inverted
    disconnect: bool = False  # the send fails


Faults = Callable[[UnitHeader], Delivery]


def no_faults(header: UnitHeader) -> Delivery:
    """Every unit arrives once, whole and at once."""
    return Delivery()


class LoopbackNetwork:
    """Connects the senders and receivers of one process."""

    def __init__(self, faults: Faults = no_faults) -> None:
        self.faults = faults
        self._sinks: dict[str, UnitSink] = {}
        self._numbers = count(1)

    def receiver(self, sink: UnitSink) -> LoopbackReceiver:
        """A new receiving end."""
        url = f"loopback://{next(self._numbers)}"
        self._sinks[url] = sink
        return LoopbackReceiver(self, url)

    def sender(self, me: NodeId) -> LoopbackSender:
        """A new sending end."""
        return LoopbackSender(self, me)

    def forget(self, url: str) -> None:
        """The receiver at `url` is closed; what is on the way to it is lost."""
        self._sinks.pop(url, None)

    def deliver(self, url: str, sender: NodeId, header: UnitHeader, data: memoryview) -> None:
        """Hand the bytes to the receiver, if it is still there."""
        sink = self._sinks.get(url)
        landing = sink.begin(sender, header) if sink else None
        if landing is None:
            return
        num_bytes = 0
        try:
            landing.fill(data)
            num_bytes = len(data)
        finally:
            landing.end(num_bytes)


@dataclass(slots=True)
class LoopbackReceiver:
    """See UnitReceiver."""

    network: LoopbackNetwork
    url: str

    @property
    def address(self) -> TransportAddress:
        return TransportAddress(NAME, self.url)

    def close(self) -> None:
        self.network.forget(self.url)


@dataclass(slots=True)
class LoopbackSender:
    """See UnitSender."""

    network: LoopbackNetwork
    me: NodeId

    def reaches(self, url: str, to: NodeId) -> bool:
        """See UnitSender."""
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
        delivery = self.network.faults(header)
        if delivery.disconnect:
            raise TransferError("transport", f"{to} is disconnected")

        def arrive() -> None:
            try:
                data = _damaged(payload, delivery)
                for _ in range(delivery.copies):
                    self.network.deliver(url, self.me, header, data)
            finally:
                on_done()

        asyncio.get_running_loop().call_later(delivery.delay_s, arrive)

    def close(self) -> None:
        """Nothing to close: deliveries under way end with the loop."""


def _damaged(payload: memoryview, delivery: Delivery) -> memoryview:
    if delivery.truncate_to is None and delivery.flip_bit is None:
        return payload
    data = bytearray(payload[: delivery.truncate_to])
    if delivery.flip_bit is not None:
        data[delivery.flip_bit // 8] ^= 1 << (delivery.flip_bit % 8)
    return memoryview(data)
