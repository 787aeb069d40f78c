"""The machines broken on purpose, one safeguard at a time: the explorer must see each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast
from unittest.mock import patch

from engine.block_pool import BlockPool, BlockState
from engine.reservations import Reservation, Reservations
from kvtransfer.block_memory import ArrivedUnit, InPlace, TellWritten
from kvtransfer.digest import UnitSealer, content_of
from kvtransfer.handoff import Handoff
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.outcomes import Outcome, Outcomes
from kvtransfer.sender import KVSender
from wire.codec import decode
from wire.errors import TransferError
from wire.handoff_messages import UnitHeader
from wire.sockets import Inbox
from wire.types import AttemptId, BlockHandle, NodeId


@dataclass(frozen=True, slots=True)
class Mutation:
    """One safeguard removed, and a scenario in which it matters."""

    name: str
    scenario: str
    changes: tuple[tuple[object, str, Any], ...]  # object, attribute, its new value

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for target, attribute, value in self.changes:
                stack.enter_context(patch.object(target, attribute, value))
            yield


def _any_sender(table: LeaseTable, number: int, capability: bytes, sender: NodeId) -> Lease:
    lease = table._leases.get(number)
    if lease is None or lease.capability != capability:
        raise TransferError("refused", "no such lease")
    return lease


def _any_handle(
    table: LeaseTable, header: UnitHeader, sender: NodeId, now: float, num_units: int = 1
) -> Lease:
    table.expire(now)
    lease = table._claimed(header.lease, header.capability, sender)
    if header.unit not in lease.units or header.unit in lease.landed | dict.fromkeys(lease.landing):
        raise TransferError("refused", "not wanted")
    lease.landing.add(header.unit)
    return lease


def _any_generation(pool: BlockPool, handle: BlockHandle) -> bool:
    return True


def _twice(
    table: LeaseTable, header: UnitHeader, sender: NodeId, now: float, num_units: int = 1
) -> Lease:
    table.expire(now)
    lease = table._claimed(header.lease, header.capability, sender)
    if header.unit not in lease.units or lease.handles[header.unit] != header.handle:
        raise TransferError("refused", "not wanted")
    lease.landing.add(header.unit)
    return lease


def _no_comparison(
    table: LeaseTable, lease: Lease, manifest: object, landed: object, now: float
) -> None:
    if lease.complete:
        table._end(lease, LeaseState.COMMITTED, "", now)


def _state_without_io(pool: BlockPool, block_id: int) -> BlockState:
    if pool._running[block_id]:
        return BlockState.RUNNING
    if pool._leased[block_id]:
        return BlockState.LEASED
    return BlockState.FREE if pool._content[block_id] is None else BlockState.CACHED


def _expire_silently(table: LeaseTable, now: float) -> None:
    for lease in list(table._leases.values()):
        if lease.deadline <= now:
            lease.state = LeaseState.EXPIRED
            del table._leases[lease.number]
            del table._by_request[lease.id.request]


def _told_twice(original: Callable[..., list[Lease]]) -> Callable[[LeaseTable], list[Lease]]:
    def take_ended(table: LeaseTable) -> list[Lease]:
        ended = original(table)
        return ended + [lease for lease in ended if lease.state is LeaseState.EXPIRED]

    return take_ended


def _only_live(table: LeaseTable, id: AttemptId) -> bool:
    lease = table._by_request.get(id.request)
    return bool(lease and lease.id.attempt > id.attempt)


def _renew_for_ever(table: LeaseTable, lease: Lease, now: float) -> None:
    lease.deadline = now + lease.ttl_s


def _forget(outcomes: Outcomes, request: str, outcome: Outcome) -> None:
    """No tombstones."""


def _end_units_of_any(
    table: LeaseTable,
    lease: Lease,
    units: dict[int, bytes | None],
    now: float,
    cause: str = "",
) -> None:
    """Whether the lease still lives is not asked."""
    lease.landing.difference_update(units)
    landed = {index: digest for index, digest in units.items() if digest is not None}
    if len(landed) < len(units):
        table._end(lease, LeaseState.REJECTED, cause, now)
    else:
        lease.landed |= landed
        if lease.manifest is not None:
            table._judge(lease, lease.manifest, landed, now)


def _no_sender_io(original: Callable[..., bool]) -> Callable[[BlockPool, BlockHandle], bool]:
    """Transfers do not hold blocks on prefill nodes (epochs from 100 on)."""

    def begin_io(pool: BlockPool, handle: BlockHandle) -> bool:
        return pool.epoch >= 100 or original(pool, handle)

    return begin_io


def _end_io_if_begun(original: Callable[..., None]) -> Callable[[BlockPool, int], None]:
    def end_io(pool: BlockPool, block_id: int) -> None:
        if pool.epoch < 100:
            original(pool, block_id)

    return end_io


def _hear_everything(inbox: Inbox, data: bytes, routing_id: bytes | None) -> None:
    inbox.on_message(decode(data))


def _not_put_there(
    memory: InPlace, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, *, seed: int
) -> None:
    """Digested where it arrived, and never put into its slots."""
    tell([content_of(cast(memoryview, unit.data), seed) for unit in units])


def _sealed_loosely(sealer: UnitSealer, unit: Any, content: bytes) -> bytes:
    """A digest that binds nothing."""
    return b"0" * 16


def _never_deadline(sender: KVSender) -> None:
    """Handoffs outlive their requests."""


def _no_supersede(original: Callable[..., Lease]) -> Callable[..., Lease]:
    def grant(table: LeaseTable, id: AttemptId, **rest: Any) -> Lease:
        table._by_request.pop(id.request, None)
        return original(table, id, **rest)

    return grant


def _no_layers(original: Callable[..., None]) -> Callable[..., None]:
    """A block is taken for finished when its first layers are."""

    def blocks_finished(
        sender: KVSender, id: AttemptId, blocks: Any, num_layers: int | None = None
    ) -> None:
        original(sender, id, blocks)

    return blocks_finished


def _rebound_with(original: Callable[..., Lease], keep: tuple[str, ...]) -> Callable[..., Lease]:
    """A rebound lease that has something of the old one."""

    def grant(table: LeaseTable, id: AttemptId, **rest: Any) -> Lease:
        older = table._by_request.get(id.request)
        lease = original(table, id, **rest)
        if rest.get("rebinds") and older is not None:
            for name in keep:
                setattr(lease, name, getattr(older, name))
        return lease

    return grant


def _rebound_beside(original: Callable[..., Lease]) -> Callable[..., Lease]:
    """The old lease lives on."""

    def grant(table: LeaseTable, id: AttemptId, **rest: Any) -> Lease:
        if rest.get("rebinds"):
            table._by_request.pop(id.request)
        return original(table, id, **rest)

    return grant


def _same_blocks(
    reservations: Reservations, reservation_id: int, tokens: Any, hashes: Any, matched: Any
) -> Reservation:
    """All blocks stay, whoever may still write them."""
    old = reservations._reserved.pop(reservation_id)
    handles = reservations._pool.handles(old.block_ids)
    new = Reservation(next(reservations._ids), handles, len(tokens), 0)
    reservations._reserved[new.id] = old
    return new


def _acknowledged_twice(handoff: Handoff, num_bytes: int) -> None:
    """As if acknowledgements were no totals."""
    handoff._acked_bytes = min(handoff._acked_bytes + num_bytes, handoff.bytes_sent)


def _something_landed(lease: Lease) -> bool:
    return bool(lease.landed)


TWO = "two attempts on two prefill nodes"
ROOM = "two attempts, one unit of room"
DAMAGE = "one attempt, two units, damage"
CONFUSED = "a confused sender"
CONFUSED_UNITS = "a confused sender, two units"
REBOUND = "rebound to another prefill node"
CONFUSED_REBIND = "a confused sender after a rebind"
NARROW = "one attempt, a window of one unit"
REBIRTH = "the decode node restarts"

MUTATIONS = (
    Mutation("capability ignored", CONFUSED, ((Lease, "proves", lambda *_: True),)),
    Mutation("sender ignored", CONFUSED, ((LeaseTable, "_claimed", _any_sender),)),
    Mutation("handle ignored", CONFUSED_UNITS, ((LeaseTable, "begin_unit", _any_handle),)),
    Mutation(
        "generation ignored",
        CONFUSED_UNITS,
        ((LeaseTable, "begin_unit", _any_handle), (BlockPool, "_names", _any_generation)),
    ),
    Mutation("digests not compared", DAMAGE, ((LeaseTable, "_judge", _no_comparison),)),
    Mutation("digest binds nothing", DAMAGE, ((UnitSealer, "seal", _sealed_loosely),)),
    Mutation(
        "arrived units not put into their blocks", DAMAGE, ((InPlace, "write", _not_put_there),)
    ),
    Mutation("a unit written twice", TWO, ((LeaseTable, "begin_unit", _twice),)),
    Mutation(
        "committed with units missing", DAMAGE, ((Lease, "complete", property(_something_landed)),)
    ),
    Mutation("quarantine ignored", ROOM, ((BlockPool, "state", _state_without_io),)),
    Mutation("expired leases not given out", TWO, ((LeaseTable, "expire", _expire_silently),)),
    Mutation(
        "given out twice", TWO, ((LeaseTable, "take_ended", _told_twice(LeaseTable.take_ended)),)
    ),
    Mutation("tombstones ignored", ROOM, ((LeaseTable, "superseded", _only_live),)),
    Mutation("no tombstones", ROOM, ((Outcomes, "remember", _forget),)),
    Mutation("renewed for ever", TWO, ((LeaseTable, "_renew", _renew_for_ever),)),
    Mutation("a late landing counts", TWO, ((LeaseTable, "end_units", _end_units_of_any),)),
    Mutation("both attempts live", TWO, ((LeaseTable, "grant", _no_supersede(LeaseTable.grant)),)),
    Mutation(
        "sends do not hold their blocks",
        "two attempts on one prefill node",
        (
            (BlockPool, "begin_io", _no_sender_io(BlockPool.begin_io)),
            (BlockPool, "end_io", _end_io_if_begun(BlockPool.end_io)),
        ),
    ),
    Mutation(
        "layers sent before they are computed",
        "one attempt, two layer groups, damage",
        ((KVSender, "blocks_finished", _no_layers(KVSender.blocks_finished)),),
    ),
    Mutation("acknowledgements add up", NARROW, ((Handoff, "acknowledged", _acknowledged_twice),)),
    Mutation("handoffs without a deadline", TWO, ((KVSender, "tick", _never_deadline),)),
    Mutation(
        "a rebound lease keeps its capability",
        CONFUSED_REBIND,
        ((LeaseTable, "grant", _rebound_with(LeaseTable.grant, ("capability",))),),
    ),
    Mutation(
        "what came before a rebind counts",
        REBOUND,
        (
            (LeaseTable, "grant", _rebound_with(LeaseTable.grant, ("landed",))),
            (UnitSealer, "seal", _sealed_loosely),
        ),
    ),
    Mutation(
        "a commit of the old lease counts after a rebind",
        REBOUND,
        ((LeaseTable, "grant", _rebound_beside(LeaseTable.grant)),),
    ),
    Mutation(
        "a rebind reuses blocks under a write", REBOUND, ((Reservations, "rebind", _same_blocks),)
    ),
    Mutation("mail for another life heard", REBIRTH, ((Inbox, "receive", _hear_everything),)),
)
