"""What a transport is: it carries units from a sender's memory to a receiver's sink.

A transport moves bytes and judges nothing. The owner of the memory places them: before the bytes
are written the sink is asked where they may go, and its answer may be "nowhere".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from kvtransfer.block_memory import DeviceBytes
from telemetry import metrics as names
from telemetry.histogram import Buckets
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.request_messages import TransferRecord
from wire.types import NodeId, TransportAddress


class Landing(Protocol):
    """A place where the bytes of one unit, or of several in one piece, may be written, once."""

    @property
    def view(self) -> memoryview: ...

    def fill(self, data: memoryview) -> None:
        """Copy `data` into `view`, as far as it fits.

        For a transport that has the bytes in memory: this way they are verified while they are in
        the processor's cache.
        """
        ...

    def end(self, num_bytes: int) -> None:
        """The bytes are in `view`; `num_bytes` is how many really came."""
        ...


@runtime_checkable
class DeviceLanding(Protocol):
    """A landing that can be filled from a device's memory."""

    def take(self, source: DeviceBytes, on_over: Callable[[], None]) -> None:
        """Have the bytes copied, and end the landing; `on_over` is called once nobody reads them.

        Instead of `fill` and `end`. Also where it raises, `on_over` has been called.
        """
        ...


class UnitSink(Protocol):
    """Decides where a unit's bytes go."""

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> Landing | None:
        """A place for the unit, or None: its bytes must go nowhere.

        With `num_units` it is for that many units of the block, which travel in one piece: the
        header's, and those that follow it.
        """
        ...


class UnitSender(Protocol):
    """The sending end of a transport; one per node and transport, for all peers."""

    def reaches(self, url: str, to: NodeId) -> bool:
        """Whether `to` can be reached at `url` from here at all. May connect.

        Raises:
            TransferError: it could, but that does not work now.
        """
        ...

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        """Send one unit. `payload` must not change until `on_done` is called from the loop.

        Raises:
            TransferError: nothing was sent, and `on_done` will not be called.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class DeviceUnitSender(Protocol):
    """A sender that need not have what is sent on the host: the receiver reads it on the device."""

    def send_from_device(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        source: DeviceBytes,
        on_done: Callable[[], None],
    ) -> None:
        """See UnitSender.send."""
        ...


OnLost: TypeAlias = Callable[[TransportAddress, TransferError], None]
"""Told when a way to a decode node ended by itself: what it carried may not have arrived."""


class UnitReceiver(Protocol):
    """The receiving end of a transport."""

    @property
    def address(self) -> TransportAddress: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class TransferStats:
    """Counts of one node's transfers; the node exports them as metrics."""

    bytes_sent: int = 0
    bytes_received: int = 0
    units_received: int = 0
    messages_unsent: int = 0  # to a node that was not connected or did not read
    units_dropped: Counter[str] = field(default_factory=Counter)  # by cause
    transport_failures: Counter[str] = field(default_factory=Counter)  # by transport
    handoffs: Counter[str] = field(default_factory=Counter)  # by outcome: committed, or the cause
    histograms: dict[names.Metric, dict[str, Buckets]] = field(default_factory=dict)
    """Of committed transfers, by transport: as many as this node has."""

    def count_transfer(self, record: TransferRecord) -> None:
        """A handoff was committed. Without bytes there is neither a rate nor a tail."""
        self._observe(names.TRANSFER_BYTES, record.transport, record.num_bytes)
        self._observe(names.TRANSFER_COMMIT_WAIT, record.transport, record.commit_wait_s)
        if record.num_bytes:
            self._observe(names.TRANSFER_SECONDS, record.transport, record.seconds)
            self._observe(names.TRANSFER_TAIL_BYTES, record.transport, record.tail_bytes)
            self._observe(names.TRANSFER_TAIL_SECONDS, record.transport, record.tail_s)
        if record.num_bytes and record.seconds:
            self._observe(names.TRANSFER_RATE, record.transport, record.num_bytes / record.seconds)

    def _observe(self, metric: names.Metric, transport: str, value: float) -> None:
        by_transport = self.histograms.setdefault(metric, {})
        by_transport.setdefault(transport or "none", Buckets.of(metric)).observe(value)
