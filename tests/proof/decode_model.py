"""A decode node of the model: the real KVReceiver, LeaseTable, BlockPool and Reservations.

What is around them does what `decode_node.role` does. A unit's bytes land in an event of their own,
any time after the receiver allowed it, also when the lease has ended long ago.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import kvtransfer.receiver
from engine.block_pool import BlockPool, BlockState, Owner
from engine.prefix_cache import PrefixCache
from engine.reservations import Reservation, Reservations
from kvtransfer.block_memory import InPlace
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.transport import Landing, TransferStats
from tests.kvtransfer.pool import filled
from tests.proof.packets import (
    ADDRESS,
    DEADLINE_S,
    LAYOUT,
    ROUTER,
    TTL,
    Packet,
    content,
    must,
    secret,
)
from wire.codec import Envelope
from wire.errors import CapacityError
from wire.geometry import Geometry
from wire.handoff_messages import UnitHeader
from wire.messages import Message
from wire.request_messages import Abort, Grant, Prefill, Rebind, Reserve
from wire.sockets import Inbox
from wire.types import AttemptId, BlockHandle, NodeId

Event = tuple[str, int]


class Secrets:
    """In place of the module `secrets` where the receiver looks for it: see `packets.secret`."""

    def __init__(self) -> None:
        self.names: tuple[object, ...] = ()

    def token_bytes(self, size: int) -> bytes:
        self.names = (*self.names, size)
        return secret(*self.names)


@dataclass(slots=True, eq=False)
class Pending:
    """An attempt whose KV has not arrived yet."""

    message: Reserve
    reservation: Reservation
    lease: int
    granted: tuple[Packet, ...]


@dataclass(slots=True, eq=False)
class Running:
    """An attempt that generates: its blocks are read at every step."""

    id: AttemptId
    prefill: NodeId
    num_tokens: int
    num_cached_blocks: int
    block_ids: list[int]
    hashes: list[bytes]


@dataclass(slots=True, eq=False)
class Write:
    """A matched write: nobody can revoke it, it lands some time."""

    header: UnitHeader
    landing: Landing
    data: bytes


class DecodeModel(InPlace):
    """See the module's docstring. Implements BlockMemory."""

    def __init__(
        self,
        me: NodeId,
        num_blocks: int,
        ways_to_land: tuple[str, ...],
        table_supersedes: bool,
        geometry: Geometry,
    ) -> None:
        self.me = me
        self.now = 0.0
        self.out: list[Packet] = []
        self.layout = LAYOUT
        self.ways_to_land = ways_to_land
        self.table_supersedes = table_supersedes
        self.geometry = geometry
        self.pool = BlockPool(num_blocks, epoch=me.incarnation)
        self.cache = PrefixCache(self.pool, LAYOUT.block_size, "model")
        self.reservations = Reservations(self.pool, self.cache, LAYOUT.block_size)
        self.memory = [bytearray(LAYOUT.block_bytes) for _ in range(num_blocks)]
        self.table = LeaseTable(ttl_s=TTL)
        self.receiver = KVReceiver(
            memory=self,
            table=self.table,
            send=self.post,
            on_ended=self.lease_ended,
            model_fingerprint="model",
            stats=TransferStats(),
            clock=self.clock,
        )
        self.inbox = Inbox(me, self.handle, self.post)
        self.pending: dict[str, Pending] = {}
        self.running: dict[str, Running] = {}
        self.writes: list[Write] = []
        self.num_granted = self.num_rebound = 0
        self.ended: dict[int, LeaseState] = {}  # every lease that was given out
        self.aborted: dict[str, int] = {}
        self.broken = ""  # found within a callback, whose errors the receiver logs and survives

    def clock(self) -> float:
        return self.now

    # ------------------------------------------------------------ what can happen

    def events(self) -> list[Event]:
        """All that may happen here now without a message."""
        return [
            *[(way, index) for index in range(len(self.writes)) for way in self.ways_to_land],
            *[("finish", ord(request)) for request in sorted(self.running)],
            ("tick", 0),
        ]

    def happen(self, event: Event) -> None:
        kind, index = event
        if kind == "tick":
            self.receiver.tick()
        elif kind == "finish":
            self.end_running(self.running[chr(index)].id)
        else:
            self.land(self.writes.pop(index), kind)

    def land(self, write: Write, way: str) -> None:
        data = bytearray(write.data)
        if way == "land short":
            del data[4:]
        elif way == "land flipped":
            data[0] ^= 0x80
        write.landing.view[: len(data)] = data
        write.landing.end(len(data))

    def receive(self, packet: Packet) -> None:
        if packet.data is None:
            self.inbox.receive(packet.envelope, None)
        elif packet.receiver == self.me:  # as the receiving ends of transports check
            assert isinstance(packet.message, UnitHeader)
            landing = self.receiver.begin(packet.sender, packet.message)
            if landing is not None:
                self.writes.append(Write(packet.message, landing, packet.data))
                self.writes.sort(key=lambda w: (w.header.lease, w.header.unit, w.data))

    # ------------------------------------------------------------ as the role does

    def handle(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Reserve):
            self.reserve(message)
        elif isinstance(message, Rebind):
            self.rebind(message)
        elif isinstance(message, Abort):
            known = self.aborted.get(message.id.request, 0)
            self.aborted[message.id.request] = max(known, message.id.attempt)
            self.receiver.abort(message.id)
            self.end_running(message.id)
        else:
            self.receiver.handle(envelope.sender, message)

    def reserve(self, message: Reserve) -> None:
        id = message.id
        pending, running = self.pending.get(id.request), self.running.get(id.request)
        if pending is not None and pending.message.id == id:
            self.out += pending.granted
            return
        if self.table.superseded(id) or (running is not None and running.id.attempt >= id.attempt):
            return  # refused
        self.end_running(id)
        if pending is not None and not self.table_supersedes:
            self.receiver.abort(pending.message.id)  # a lower attempt: its room is needed
        try:
            reservation = self.reservations.open(
                message.tokens, *self.found(message), LAYOUT.num_blocks(len(message.tokens))
            )
        except CapacityError:
            return  # refused
        self.grant(message, reservation)

    def rebind(self, message: Rebind) -> None:
        id, pending = message.id, self.pending.get(message.id.request)
        if pending is not None and pending.message.id == id:
            self.out += pending.granted
        elif not self.rebound(message):  # refused: the attempt before is over all the same
            if pending is not None and pending.message.id.attempt < id.attempt:
                self.receiver.abort(pending.message.id)
            self.end_running(AttemptId(id.request, id.attempt - 1))

    def rebound(self, message: Rebind) -> bool:
        live = self.receiver.rebindable(message.id, message.lease)
        pending = self.pending.get(message.id.request)
        if pending is None or not live or self.table.superseded(message.id):
            return False
        tokens = (*pending.message.tokens, *message.output_tokens)
        reserve = replace(pending.message, id=message.id, tokens=tokens, prefill=message.prefill)
        received = self.reservations.peek(pending.reservation.id).received_ids
        returning = len(received) - self.pool.num_in_transfer(received)
        if LAYOUT.num_blocks(len(tokens)) > self.pool.num_available + returning:
            return False
        hashes = self.cache.hashes(tokens, "")
        reservation = self.reservations.rebind(pending.reservation.id, tokens, hashes, [])
        self.grant(reserve, reservation, rebinds=True)
        self.num_rebound += 1
        return True

    def found(self, message: Reserve) -> tuple[list[bytes], list[int]]:
        """The scheduler's part of a reservation: hashes and cached blocks, if the rest fits."""
        hashes = self.cache.hashes(message.tokens, "")
        matched = self.cache.match(hashes)
        missing = LAYOUT.num_blocks(len(message.tokens)) - len(matched)
        if missing > self.pool.num_available - self.pool.num_cached_among(matched):
            raise CapacityError("no room")
        return hashes, matched

    def grant(self, message: Reserve, reservation: Reservation, rebinds: bool = False) -> None:
        must(
            message.id.attempt > self.aborted.get(message.id.request, 0),
            f"{message.id} is granted after its abort",
        )
        kvtransfer.receiver.secrets.names = (self.me, self.num_granted)  # type: ignore[attr-defined]
        lease = self.receiver.grant(
            message.id,
            sender=message.prefill,
            tokens=message.tokens,
            num_cached_tokens=reservation.num_cached_tokens,
            handles=reservation.handles,
            cache_salt="",
            deadline_s=message.deadline_s,
            geometry=self.geometry,
            rebinds=rebinds,
        )
        self.num_granted += 1
        granted = (
            Packet(ROUTER, message.prefill, self.prefill_message(message, reservation, lease)),
        )
        self.pending[message.id.request] = Pending(message, reservation, lease.number, granted)
        self.out += granted

    def prefill_message(self, message: Reserve, reservation: Reservation, lease: Lease) -> Prefill:
        """What the router makes of a grant; the model's router only passes it on."""
        grant = Grant(
            lease=lease.number,
            capability=lease.capability,
            digest_key=lease.digest_key,
            decode=self.me,
            peer_url="peer",
            transports=(ADDRESS,),
            layout=LAYOUT,
            handles=reservation.handles,
            num_cached_tokens=reservation.num_cached_tokens,
            ttl_s=TTL,
            geometry=self.geometry,
        )
        return Prefill(
            message.id,
            message.tokens,
            message.num_prompt_tokens,
            message.sampling,
            grant,
            deadline_s=DEADLINE_S,
        )

    def end_running(self, id: AttemptId) -> None:
        running = self.running.get(id.request)
        if running is not None and running.id.attempt <= id.attempt:
            del self.running[id.request]
            full = running.num_tokens // LAYOUT.block_size
            self.cache.release(running.block_ids, running.hashes[:full], Owner.RUNNING)

    def lease_ended(self, lease: Lease) -> None:
        try:
            must(lease.number not in self.ended, f"lease {lease.number} ended twice")
            pending = self.pending.pop(lease.id.request)
            must(pending.message.id == lease.id, "a lease ended under another's name")
            self.ended[lease.number] = lease.state
            if lease.cause == "rebound":
                must(pending.reservation.id not in self.reservations._reserved, "room held twice")
            elif lease.state is LeaseState.COMMITTED:
                self.adopt(lease, pending)
            else:
                self.reservations.cancel(pending.reservation.id)
        except Exception as error:
            self.broken = repr(error)
            raise

    def adopt(self, lease: Lease, pending: Pending) -> None:
        reserved = self.reservations.adopt(pending.reservation.id)
        self.running[lease.id.request] = Running(
            lease.id,
            lease.sender,
            len(reserved.tokens),
            reserved.num_cached_blocks,
            reserved.block_ids,
            reserved.hashes,
        )

    # ------------------------------------------------------------ BlockMemory, messages

    def block_bytes(self, block_id: int) -> memoryview:
        return memoryview(self.memory[block_id])

    def begin_io(self, handle: BlockHandle) -> bool:
        return self.pool.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        self.pool.end_io(handle.block_id)

    def post(self, to: NodeId, message: Message) -> None:
        self.out.append(Packet(self.me, to, message))

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        """Every invariant, in this very state."""
        must(not self.broken, self.broken)
        self.pool.check_integrity()
        self.cache.check_integrity()
        self.check_leases()
        self.check_owners()
        self.check_writes()
        for running in self.running.values():
            self.check_content(running)
        self.check_cached()

    def check_leases(self) -> None:
        live = self.table._leases
        must(
            live.keys() | self.ended.keys() == set(range(1, self.num_granted + 1))
            and not live.keys() & self.ended.keys(),
            f"{self.num_granted} leases, live {list(live)}, given out {list(self.ended)}",
        )
        must(sorted(live) == sorted(p.lease for p in self.pending.values()), "a lease is nobody's")
        must(live.keys() == self.receiver._incoming.keys(), "the receiver keeps an ended lease")
        must(len(self.reservations) == len(self.pending), "a reservation is nobody's")
        must(len(self.table._deadlines) <= 2 * self.num_granted, "deadlines pile up")
        must(len(self.table._outcomes) <= self.num_granted + len(self.aborted), "outcomes pile up")
        for lease in live.values():
            must(
                lease.deadline <= lease.hard_deadline, f"lease {lease.number} outlives its request"
            )
            wake = self.table.next_deadline()
            must(wake is not None and wake <= lease.deadline, "a deadline would be slept through")
            must(lease.id.attempt > self.aborted.get(lease.id.request, 0), "an aborted lease lives")

    def check_owners(self) -> None:
        """Only verified blocks, found in the cache, may have several owners."""
        must(not self.pending.keys() & self.running.keys(), "two attempts of one request")
        leased, running, own = 0, 0, list[int]()
        for pending in self.pending.values():
            blocks = [handle.block_id for handle in pending.reservation.handles]
            leased += len(blocks)
            own += blocks[pending.reservation.num_cached_tokens // LAYOUT.block_size :]
        for request in self.running.values():
            running += len(request.block_ids)
            own += request.block_ids[request.num_cached_blocks :]
        must(len(own) == len(set(own)), f"a block has two owners: {own}")
        must(self.pool.num_references(Owner.LEASED) == leased, "leased references differ")
        must(self.pool.num_references(Owner.RUNNING) == running, "running references differ")

    def check_writes(self) -> None:
        """A block that may be written belongs to the writer's lease, or to nobody."""
        for write in self.writes:
            handle = write.header.handle
            must(
                self.pool.handle(handle.block_id) == handle, f"{handle} was given out under a write"
            )
            lease = self.table._leases.get(write.header.lease)
            state = self.pool.state(handle.block_id)
            expected = BlockState.QUARANTINED if lease is None else BlockState.LEASED
            must(state is expected, f"{handle} is {state.name} under a write, not {expected.name}")
            must(self.pool.content_hash(handle.block_id) is None, "a findable block is written")

    def check_content(self, running: Running) -> None:
        """What a step reads is what the prefill node sealed for this very attempt."""
        for index in range(running.num_cached_blocks, len(running.block_ids)):
            num_tokens = min(LAYOUT.block_size, running.num_tokens - index * LAYOUT.block_size)
            block = self.block_bytes(running.block_ids[index])
            actual = filled(block, num_tokens, LAYOUT)
            wanted = content(running.id, index, num_tokens, running.prefill)
            must(actual == wanted, f"unit {index} of {running.id} holds {actual.hex()}")

    def check_cached(self) -> None:
        """What others may find is whole, and some attempt's."""
        for block_id, block in enumerate(self.memory):
            if self.pool.content_hash(block_id) is not None:
                half = len(block) // LAYOUT.num_layers
                for layer in (block[:half], block[half:]):
                    cells = {bytes(layer[i : i + 4]) for i in range(0, half, 4)}
                    whole = len(cells) == 1 and b"\0" not in cells
                    must(whole, f"block {block_id} is cached broken")

    def drain(self) -> None:
        """Everything is lost, time passes, writes land: all blocks must come back."""
        self.now += TTL
        self.receiver.tick()
        must(not self.table._leases, "a lease outlives its TTL")
        must(not self.pending, "an ended lease keeps its blocks")
        written = {write.header.handle.block_id for write in self.writes}
        must(self.pool.counts().quarantined == len(written), "quarantined for no transfer")
        while self.writes:
            self.land(self.writes.pop(), "land")
        for running in list(self.running.values()):
            self.end_running(running.id)
        self.check()
        counts = self.pool.counts()
        must(counts.free + counts.cached == counts.total, f"blocks have leaked: {counts}")
