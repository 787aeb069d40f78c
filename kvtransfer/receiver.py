"""The decode node's end of the handoff: places bytes under live leases, verifies, commits.

Runs in the event loop. All decisions are the lease table's; this file connects them to memory,
messages and time. Whatever an event did, `_settle` hands every ended lease to its owner once.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from kvtransfer.block_memory import ArrivedUnit, BlockMemory, DeviceBytes
from kvtransfer.digest import UnitSealer
from kvtransfer.handoff import CREDIT_BYTES
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.outcomes import Outcome
from kvtransfer.relay import place_of
from kvtransfer.transport import TransferStats
from kvtransfer.units import Unit, unit_bytes, units_of
from telemetry.causes import known_cause
from wire.errors import TransferError, WireError
from wire.geometry import WHOLE_BLOCKS, Geometry
from wire.handoff_messages import (
    Commit,
    Committed,
    LeaseEnded,
    ReleaseLease,
    RenewLeases,
    UnitHeader,
    UnitsReceived,
)
from wire.messages import Message
from wire.types import AttemptId, BlockHandle, NodeId

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Incoming:
    """What is kept of a live lease besides the table's part."""

    lease: Lease
    sealer: UnitSealer
    geometry: Geometry
    num_bytes: int = 0  # that have arrived
    num_acknowledged: int = 0  # of these


def nothing() -> None:
    """What most transports want to be done when a unit is in its block."""


class KVReceiver:
    """All incoming handoffs of one decode node.

    Args:
        send: sends a message to a prefill node; may raise WireError, which is not fatal here
            because the prefill node asks again.
        on_ended: called once per lease, in the loop, in whatever state it ended.
    """

    def __init__(
        self,
        *,
        memory: BlockMemory,
        table: LeaseTable,
        send: Callable[[NodeId, Message], None],
        on_ended: Callable[[Lease], None],
        model_fingerprint: str,
        stats: TransferStats,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table = table
        self._memory = memory
        self._send = send
        self._on_ended = on_ended
        self._fingerprint = model_fingerprint
        self._stats = stats
        self._clock = clock
        self._incoming: dict[int, _Incoming] = {}  # by lease; the live ones

    # ------------------------------------------------------------ for the decode role

    def rebindable(self, id: AttemptId, lease: int) -> bool:
        """Whether that lease lives, and `id` is a later attempt of its request."""
        try:
            return self.table.rebindable(id, lease, self._clock())
        finally:
            self._settle()

    def grant(
        self,
        id: AttemptId,
        *,
        sender: NodeId,
        tokens: Sequence[int],
        num_cached_tokens: int,
        handles: tuple[BlockHandle, ...],
        cache_salt: str,
        deadline_s: float,
        geometry: Geometry = WHOLE_BLOCKS,
        rebinds: bool = False,
    ) -> Lease:
        """Let `sender` fill `handles` with the KV of `tokens` beyond the cached ones.

        With `rebinds` it does so in place of the sender of the request's older lease.
        """
        self.table.new_life(sender, self._clock())
        lease = self.table.grant(
            id,
            sender=sender,
            units=units_of(len(tokens), num_cached_tokens, self._memory.layout, geometry),
            handles=handles,
            capability=secrets.token_bytes(16),
            digest_key=secrets.token_bytes(16),
            now=self._clock(),
            deadline_s=deadline_s,
            rebinds=rebinds,
        )
        sealer = UnitSealer(
            key=lease.digest_key,
            id=id,
            lease=lease.number,
            tokens=tokens,
            block_size=self._memory.layout.block_size,
            model_fingerprint=self._fingerprint,
            cache_salt=cache_salt,
        )
        self._incoming[lease.number] = _Incoming(lease, sealer, geometry)
        self._settle()
        return lease

    def abort(self, id: AttemptId) -> None:
        """The router gave this attempt up."""
        self.table.abort(id, self._clock())
        self._settle()

    def tick(self) -> None:
        """Let time pass: expire what is due, say what could not be said."""
        self.table.expire(self._clock())
        self._settle()
        for incoming in self._incoming.values():
            self._acknowledge(incoming)

    # ------------------------------------------------------------ messages of prefill nodes

    def handle(self, sender: NodeId, message: Message) -> None:
        """One message of a prefill node; others are ignored."""
        now = self._clock()
        if isinstance(message, Commit):
            self._commit(sender, message, now)
        elif isinstance(message, ReleaseLease):
            self._release(sender, message, now)
        elif isinstance(message, RenewLeases):
            self.table.renew(message.claims, sender, now)
            self._repeat_received(sender, message)
        self._settle()

    def _release(self, sender: NodeId, message: ReleaseLease, now: float) -> None:
        cause = known_cause(message.cause)
        try:
            self.table.release(message.lease, message.capability, sender, cause, now)
        except TransferError as error:
            log.warning("%s cannot release: %s", sender, error)

    def _commit(self, sender: NodeId, message: Commit, now: float) -> None:
        try:
            verdict = self.table.commit(message, sender, now)
        except TransferError as error:
            self._reply(sender, LeaseEnded(message.id, message.lease, error.cause))
            return
        if isinstance(verdict, Outcome):  # asked again: the answer got lost
            self._reply(sender, _answer(message, verdict))

    # ------------------------------------------------------------ bytes (UnitSink)

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> _BlockLanding | None:
        """See UnitSink: only a live lease's own sender may write, and each unit once."""
        try:
            lease = self.table.begin_unit(header, sender, self._clock(), num_units)
        except TransferError as error:
            self._drop(sender, header, error.cause)
            return None
        finally:
            self._settle()
        indices = range(header.unit, header.unit + num_units)
        if not self._memory.begin_io(header.handle):
            self.table.end_units(lease, dict.fromkeys(indices), self._clock(), "stale")
            self._settle()
            self._drop(sender, header, "stale")
            return None
        return _BlockLanding(
            self,
            lease,
            [lease.units[i] for i in indices],
            header,
            self._incoming[lease.number],
            self._memory,
        )

    def _landed(
        self,
        landing: _BlockLanding,
        num_bytes: int,
        parts: Sequence[memoryview | DeviceBytes],
        on_over: Callable[[], None] = nothing,
    ) -> None:
        """Bytes have arrived, in `parts` of the units: have them put into the block.

        `on_over` is called when that is done, or will not be.
        """
        incoming = self._incoming.get(landing.lease.number)
        told = partial(self._written, landing, num_bytes, on_over)
        if incoming is None or num_bytes != landing.num_bytes:
            told(None)
            return
        block_id = landing.header.handle.block_id
        units = [
            ArrivedUnit(unit, block_id, part, landing.contents.get(unit.index))
            for unit, part in zip(landing.units, parts, strict=True)
        ]
        dtype = incoming.geometry.dtype_for(self._memory.layout)
        try:
            self._memory.write(units, dtype, told, seed=incoming.sealer.seed)
        except Exception:
            told(None)
            raise

    def _written(
        self,
        landing: _BlockLanding,
        num_bytes: int,
        on_over: Callable[[], None],
        contents: Sequence[bytes] | None,
    ) -> None:
        """Nothing writes the block any more; `contents` are the hashes of what it holds."""
        if landing.over:
            return
        landing.over = True
        incoming = self._incoming.get(landing.lease.number)
        digests: dict[int, bytes | None] = dict.fromkeys(unit.index for unit in landing.units)
        try:
            if contents is not None and incoming is not None:
                for unit, content in zip(landing.units, contents, strict=True):
                    digests[unit.index] = incoming.sealer.seal(unit, content)
        finally:
            self._memory.end_io(landing.header.handle)
            self._stats.units_received += len(digests)
            self._stats.bytes_received += num_bytes
            if incoming is not None:
                incoming.num_bytes += num_bytes
                self._acknowledge(incoming)
            self.table.end_units(landing.lease, digests, self._clock())
            self._settle()
            on_over()

    def _room_for(self, landing: _BlockLanding) -> memoryview:
        """Room for the landing's units as they travel.

        Units that follow each other do so in the block, if each of them lies there in one piece:
        then they have all heads, and are cut by layers alone.
        """
        layout = self._memory.layout
        first, last = (place_of(landing.units[i], layout, landing.dtype) for i in (0, -1))
        part = None if first is None or last is None else slice(first.start, last.stop)
        return self._memory.room(landing.header.handle.block_id, part, landing.num_bytes)

    def _drop(self, sender: NodeId, header: UnitHeader, cause: str) -> None:
        self._stats.units_dropped[cause] += 1
        if cause == "expired":
            self._reply(sender, LeaseEnded(AttemptId("-", 0), header.lease, cause))

    def _acknowledge(self, incoming: _Incoming) -> None:
        """Open the sender's window; what cannot be said now is kept and said later."""
        if incoming.num_bytes - incoming.num_acknowledged >= CREDIT_BYTES:
            self._say_received(incoming)

    def _say_received(self, incoming: _Incoming) -> None:
        lease, num_bytes = incoming.lease, incoming.num_bytes
        if self._reply(lease.sender, UnitsReceived(lease.number, num_bytes)):
            incoming.num_acknowledged = num_bytes

    def _repeat_received(self, sender: NodeId, message: RenewLeases) -> None:
        """Who still waits may have missed the last word on its window."""
        for claim in message.claims:
            incoming = self._incoming.get(claim.lease)
            if incoming and incoming.lease.sender == sender and incoming.num_acknowledged:
                self._say_received(incoming)

    # ------------------------------------------------------------ endings

    def _settle(self) -> None:
        for lease in self.table.take_ended():
            self._incoming.pop(lease.number, None)
            committed = lease.state is LeaseState.COMMITTED
            self._stats.handoffs["committed" if committed else lease.cause] += 1
            self._tell_owner(lease)
            answer = (
                Committed(lease.id, lease.number)
                if committed
                else LeaseEnded(lease.id, lease.number, lease.cause)
            )
            self._reply(lease.sender, answer)

    def _tell_owner(self, lease: Lease) -> None:
        try:
            self._on_ended(lease)
        except Exception:  # a bug there must not keep the other leases' owners from hearing
            log.exception("the end of lease %d (%s) was not handled", lease.number, lease.id)

    def _reply(self, to: NodeId, message: Message) -> bool:
        try:
            self._send(to, message)
        except WireError:
            self._stats.messages_unsent += 1  # it asks again, or is dead
            return False
        return True


class _BlockLanding:
    """See Landing and DeviceLanding: the place of units of one block under one lease."""

    __slots__ = (
        *("_receiver", "_sealer", "_view", "contents", "dtype"),
        *("header", "lease", "num_bytes", "over", "units"),
    )

    def __init__(
        self,
        receiver: KVReceiver,
        lease: Lease,
        units: Sequence[Unit],
        header: UnitHeader,
        incoming: _Incoming,
        memory: BlockMemory,
    ) -> None:
        layout, geometry = memory.layout, incoming.geometry
        self.lease = lease
        self.units = units
        self.header = header
        self.dtype = geometry.dtype_for(layout)
        self.num_bytes = sum(unit_bytes(unit, layout, geometry) for unit in units)
        self.contents: dict[int, bytes] = {}  # the units' hashes, where `fill` computed them
        self.over = False  # nothing writes the block any more
        self._receiver = receiver
        self._sealer = incoming.sealer if memory.in_place else None  # else the memory hashes
        self._view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """Room for the bytes, taken when it is first asked for."""
        if self._view is None:
            self._view = self._receiver._room_for(self)
        return self._view

    def parts(self, of: memoryview) -> Sequence[memoryview]:
        """Each unit's bytes in `view`, or in what is like it."""
        return [of[part] for part in self._slices()]

    def _slices(self) -> Sequence[slice]:
        if len(self.units) == 1:
            return (slice(0, self.num_bytes),)
        vectors = [unit.num_layers * unit.num_heads for unit in self.units]  # of each token
        size, ends = self.num_bytes // sum(vectors), list(accumulate(vectors))
        return [
            slice((end - count) * size, end * size)
            for count, end in zip(vectors, ends, strict=True)
        ]

    def fill(self, data: memoryview) -> None:
        view = self.view
        if self._sealer is not None and len(data) == self.num_bytes:
            parts = zip(self.units, self.parts(data), self.parts(view), strict=True)
            for unit, part, target in parts:
                self.contents[unit.index] = self._sealer.copy(part, target)
        else:  # hashed later, or never: it is too short or too long
            size = min(len(data), len(view))
            view[:size] = data[:size]

    def end(self, num_bytes: int) -> None:
        whole = num_bytes == self.num_bytes  # else nothing is looked at
        self._receiver._landed(self, num_bytes, self.parts(self.view) if whole else ())

    def take(self, source: DeviceBytes, on_over: Callable[[], None]) -> None:
        parts = [DeviceBytes(source.address + p.start, p.stop - p.start) for p in self._slices()]
        self._receiver._landed(self, source.nbytes, parts, on_over)


def _answer(message: Commit, outcome: Outcome) -> Message:
    if outcome.committed and outcome.lease == message.lease:
        return Committed(message.id, message.lease)
    return LeaseEnded(message.id, message.lease, outcome.cause or "superseded")
