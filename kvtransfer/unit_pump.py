"""Units on their way out of a prefill node: sealed, read, sent, and their blocks kept meanwhile.

    seal ─▶ memory digests them ─▶ pump: window and memory have room ─▶ read ─▶ transport ─▶ over

From `seal` to the end of its send an io reference keeps each of a unit's blocks from being reused.
The memory may take its time to digest and to read them (`block_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

from kvtransfer.block_memory import BlockMemory, DeviceBytes, HeldUnit
from kvtransfer.handoff import ReadyUnit
from kvtransfer.outgoing import Outgoing
from kvtransfer.relay import place_of
from kvtransfer.transport import DeviceUnitSender, TransferStats, UnitSender
from kvtransfer.units import Unit
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.types import BlockHandle

NOTHING: Mapping[int, memoryview] = MappingProxyType({})


class UnitPump:
    """The units of all handoffs of one prefill node.

    Args:
        on_sealed: called when one more unit of a handoff is sealed.
        on_unsent: called when a transport did not take a unit, and why.
        on_room: called when something can be sent that the limit had held back.
        max_sending_bytes: that transports have at one time, of all handoffs; 0: no limit. Payloads
            that are copies need memory that long.
    """

    def __init__(
        self,
        memory: BlockMemory,
        transports: dict[str, UnitSender],
        stats: TransferStats,
        *,
        on_sealed: Callable[[Outgoing], None],
        on_unsent: Callable[[Outgoing, TransferError], None],
        on_room: Callable[[], None],
        max_sending_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._memory = memory
        self._transports = transports
        self._stats = stats
        self._on_sealed = on_sealed
        self._on_unsent = on_unsent
        self._on_room = on_room
        self._max_sending_bytes = max_sending_bytes
        self._clock = clock
        self._sending_bytes = 0
        self._held_back = False  # something could be sent but for the limit

    def reads_devices(self, transport: str) -> bool:
        """Whether this transport takes units where they lie on a device."""
        return isinstance(self._transports[transport], DeviceUnitSender)

    # ------------------------------------------------------------ sealing

    def seal(self, out: Outgoing, ready: Iterable[tuple[Unit, tuple[BlockHandle, ...]]]) -> None:
        """Take units whose bytes are computed, while the request still holds their blocks."""
        # A stale source belongs to a preempted run; the block comes again when recomputed.
        if units := [ReadyUnit(*both) for both in ready if self._begin_io(both[1])]:
            self._digest(out, units)

    def _digest(self, out: Outgoing, units: Sequence[ReadyUnit]) -> None:
        """Have the units read in the same go where they can leave at once."""
        out.sealing.update(ready.unit.index for ready in units)
        waiting = dict(enumerate(units))
        try:
            self._memory.read(
                [_held(ready) for ready in units],
                out.dtype,
                partial(self._sealed, out, waiting),
                seed=out.sealer.seed,
                payload=self._memory.in_place or self._can_leave(out, units),
            )
        except Exception:
            while waiting:
                self._end_io(waiting.popitem()[1].sources)
            raise

    def _sealed(
        self,
        out: Outgoing,
        waiting: dict[int, ReadyUnit],
        number: int,
        payload: memoryview | None,
        content: bytes,
    ) -> None:
        ready = waiting.pop(number, None)
        if ready is None:
            return  # others of its batch could not be read
        out.sealing.discard(ready.unit.index)
        if out.handoff.ended:
            self._end_io(ready.sources)
            return
        index = ready.unit.index
        out.handoff.offer(index, ready.sources, out.sealer.seal(ready.unit, content))
        self.pump(out, {} if payload is None else {index: payload})
        self._on_sealed(out)

    def _can_leave(self, out: Outgoing, units: Sequence[ReadyUnit]) -> bool:
        """Whether window and memory have room for the bytes of all of them now."""
        if all(self._on_device(out, ready) is not None for ready in units):
            return False  # their bytes are not needed
        num_bytes = sum(out.handoff.unit_bytes(ready.unit) for ready in units)
        limit = self._max_sending_bytes
        fits = not limit or self._sending_bytes + num_bytes <= limit
        return fits and out.handoff.has_room(num_bytes)

    # ------------------------------------------------------------ sending

    def pump(self, out: Outgoing, made: Mapping[int, memoryview] = NOTHING) -> None:
        """Send what the window admits; payloads that exist already are in `made`."""
        unread: list[tuple[UnitHeader, ReadyUnit]] = []
        while not self._is_full() and (sendable := out.handoff.next_send()) is not None:
            self._sending_bytes += sendable[0].num_bytes
            payload = self._on_device(out, sendable[1]) or made.get(sendable[0].unit)
            if payload is None:
                unread.append(sendable)
            else:
                self._send_unit(out, *sendable, payload)
        if unread:
            self._read(out, unread)

    def _read(self, out: Outgoing, units: Sequence[tuple[UnitHeader, ReadyUnit]]) -> None:
        waiting = dict(enumerate(units))
        held = [_held(ready) for _, ready in units]
        try:
            self._memory.read(held, out.dtype, partial(self._was_read, out, waiting))
        except Exception:
            while waiting:
                header, ready = waiting.popitem()[1]
                self._over(ready.sources, header.num_bytes)
            raise

    def _was_read(
        self,
        out: Outgoing,
        waiting: dict[int, tuple[UnitHeader, ReadyUnit]],
        number: int,
        payload: memoryview | None,
        content: bytes,
    ) -> None:
        header, ready = waiting.pop(number, (None, None))
        if header is None or ready is None:
            return  # others of its batch could not be read
        assert payload is not None
        if out.handoff.ended:
            self._over(ready.sources, header.num_bytes)
            self._use_room()
        else:
            self._send_unit(out, header, ready, payload)

    def _on_device(self, out: Outgoing, ready: ReadyUnit) -> DeviceBytes | None:
        """Where the unit lies as it travels, if its transport reads it there."""
        part = place_of(ready.unit, out.layout, out.dtype) if out.from_device else None
        if part is None:
            return None
        return self._memory.device_bytes(ready.sources[0].block_id, part)

    def _send_unit(
        self,
        out: Outgoing,
        header: UnitHeader,
        ready: ReadyUnit,
        payload: memoryview | DeviceBytes,
    ) -> None:
        transport = self._transports[out.address.transport]
        to = (out.address.url, out.handoff.grant.decode)
        sent = partial(self._sent, ready.sources, payload)
        try:
            if isinstance(payload, memoryview):
                transport.send(*to, header, payload, sent)
            else:
                assert isinstance(transport, DeviceUnitSender)
                transport.send_from_device(*to, header, payload, sent)
        except TransferError as error:
            self._over(ready.sources, header.num_bytes)
            self._on_unsent(out, error)
            self._use_room()
        else:
            self._stats.bytes_sent += header.num_bytes
            out.meter.sent(header.num_bytes, out.address.transport, self._clock())

    def _is_full(self) -> bool:
        limit = self._max_sending_bytes
        self._held_back |= bool(limit) and self._sending_bytes >= limit
        return bool(limit) and self._sending_bytes >= limit

    def _sent(self, sources: tuple[BlockHandle, ...], payload: memoryview | DeviceBytes) -> None:
        """A transport does not read `payload` any more; until now it was held for it."""
        self._over(sources, payload.nbytes)
        self._use_room()

    def _use_room(self) -> None:
        """Let those go on that the limit had held back; perhaps no send is left to do it later."""
        if self._held_back:
            self._held_back = False
            self._on_room()

    def _over(self, sources: tuple[BlockHandle, ...], num_bytes: int) -> None:
        self._end_io(sources)
        self._sending_bytes -= num_bytes

    # ------------------------------------------------------------ blocks

    def drop(self, unsent: Iterable[ReadyUnit]) -> None:
        """Sealed units that will not be sent."""
        for ready in unsent:
            self._end_io(ready.sources)

    def _begin_io(self, sources: Sequence[BlockHandle]) -> bool:
        """Keep all of them from being reused; False, and none is kept, if one was already."""
        for number, handle in enumerate(sources):
            if not self._memory.begin_io(handle):
                self._end_io(sources[:number])
                return False
        return True

    def _end_io(self, sources: Iterable[BlockHandle]) -> None:
        for handle in sources:
            self._memory.end_io(handle)


def _held(ready: ReadyUnit) -> HeldUnit:
    return HeldUnit(ready.unit, tuple(handle.block_id for handle in ready.sources))
