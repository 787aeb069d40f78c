"""A prefill node of the model: the real KVSender, Handoff and BlockPool; KV is a symbol.

What is around them does what `prefill_node.role` does. A send reads its block when it is carried
out, not when it is asked for, as a zero-copy send does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.block_pool import BlockPool, BlockState, Owner
from kvtransfer.block_memory import InPlace
from kvtransfer.handoff import Handoff, HandoffState
from kvtransfer.sender import KVSender
from kvtransfer.transport import TransferStats
from tests.proof.packets import ADDRESS, DEADLINE_S, LAYOUT, Packet, content, must
from wire.codec import Envelope
from wire.errors import CapacityError
from wire.handoff_messages import UnitHeader, UnitsReceived
from wire.messages import Message
from wire.request_messages import Abort, Grant, Prefill
from wire.sockets import Inbox
from wire.types import AttemptId, BlockHandle, NodeId

Event = tuple[str, int]


@dataclass(slots=True, eq=False)
class Work:
    """One attempt on this node, and its block table as far as it is computed."""

    id: AttemptId
    tokens: tuple[int, ...]
    block_ids: list[int]
    num_groups: int  # of layers
    groups_left: int = 0  # of the last block
    credit: int = 0  # bytes that the decode node has said it has


@dataclass(slots=True, eq=False)
class Send:
    """A send that still reads its block."""

    header: UnitHeader
    to: NodeId
    payload: memoryview
    on_done: Callable[[], None]
    sealed: bytes  # what the block held when the send was asked for


class PrefillModel(InPlace):
    """See the module's docstring. Implements BlockMemory and UnitSender."""

    def __init__(self, me: NodeId, num_blocks: int, window_bytes: int = 32 << 20) -> None:
        self.me = me
        self.window_bytes = window_bytes
        self.now = 0.0
        self.out: list[Packet] = []
        self.layout = LAYOUT
        self.pool = BlockPool(num_blocks, epoch=100 + me.incarnation)
        self.memory = [bytearray(LAYOUT.block_bytes) for _ in range(num_blocks)]
        self.sender = KVSender(
            memory=self,
            transports={ADDRESS.transport: self},
            send=self.post,
            on_ended=self.handoff_ended,
            model_fingerprint="model",
            stats=TransferStats(),
            window_bytes=window_bytes,
            clock=self.clock,
        )
        self.inbox = Inbox(me, self.handle, self.answer)
        self.work: dict[str, Work] = {}
        self.sends: list[Send] = []
        self.started: set[AttemptId] = set()  # the router asks once

    def clock(self) -> float:
        return self.now

    # ------------------------------------------------------------ what can happen

    def events(self) -> list[Event]:
        """All that may happen here now without a message."""
        works = sorted(self.work.values(), key=lambda work: work.id.request)
        return [
            *[
                ("compute", ord(work.id.request))
                for work in works
                if work.groups_left or len(work.block_ids) < LAYOUT.num_blocks(len(work.tokens))
            ],
            *[("carry out send", index) for index in range(len(self.sends))],
            *([("renew", 0), ("tick", 0)] if self.work else []),
        ]

    def happen(self, event: Event) -> None:
        kind, index = event
        if kind == "compute":
            self.compute(self.work[chr(index)])
        elif kind == "carry out send":
            self.carry_out(self.sends.pop(index))
        elif kind == "renew":
            self.sender.renew_leases()
        else:
            self.sender.tick()

    def receive(self, packet: Packet) -> None:
        self.inbox.receive(packet.envelope, None)

    # ------------------------------------------------------------ as the role does

    def handle(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Prefill):
            self.start(message)
        elif isinstance(message, Abort):
            work = self.work.get(message.id.request)
            if work is not None and work.id.attempt <= message.id.attempt:
                self.drop(work, "revoked")
        else:
            if isinstance(message, UnitsReceived):
                self.note_credit(envelope.sender, message)
            self.sender.handle(envelope.sender, message)

    def note_credit(self, sender: NodeId, message: UnitsReceived) -> None:
        """What an honest window may count on."""
        for out in self.sender._outgoing.values():
            grant = out.handoff.grant
            if (grant.lease, grant.decode) == (message.lease, sender):
                work = self.work[out.handoff.id.request]
                work.credit = max(work.credit, message.num_bytes)

    def start(self, message: Prefill) -> None:
        id, older = message.id, self.work.get(message.id.request)
        if id in self.started or (older is not None and older.id.attempt > id.attempt):
            return
        self.started.add(id)
        if older is not None:
            self.drop(older, "revoked")
        assert message.grant is not None
        self.sender.start(
            id,
            message.grant,
            tokens=message.tokens,
            cache_salt="",
            deadline_s=message.deadline_s,
        )
        num_groups = message.grant.geometry.num_layer_groups
        self.work[id.request] = Work(id, message.tokens, [], num_groups)

    def compute(self, work: Work) -> None:
        """A layer group of a chunk of one block; the last one brings the first token."""
        if not work.groups_left:
            try:
                work.block_ids += self.pool.allocate(1, Owner.RUNNING)
            except CapacityError:
                return  # it waits for blocks
            work.groups_left = work.num_groups
        work.groups_left -= 1
        index, block_id = len(work.block_ids) - 1, work.block_ids[-1]
        num_layers = LAYOUT.num_layers * (work.num_groups - work.groups_left) // work.num_groups
        end = LAYOUT.block_bytes * num_layers // LAYOUT.num_layers
        computed = content(work.id, index, LAYOUT.block_size, self.me)
        self.memory[block_id][:end] = computed[:end]
        finished = [(index, self.pool.handle(block_id))]
        if work.groups_left:
            self.sender.blocks_finished(work.id, finished, num_layers)
            return
        self.sender.blocks_finished(work.id, finished)
        last = index + 1 == LAYOUT.num_blocks(len(work.tokens))
        if self.work.get(work.id.request) is work and last:
            self.sender.first_token(work.id, (7,))

    def handoff_ended(self, handoff: Handoff) -> None:
        work = self.work.get(handoff.id.request)
        if work is not None and work.id == handoff.id:
            cause = "committed" if handoff.state is HandoffState.DONE else handoff.cause
            self.drop(work, cause)

    def drop(self, work: Work, cause: str) -> None:
        del self.work[work.id.request]
        self.sender.abort(work.id, cause)
        self.pool.release(work.block_ids, Owner.RUNNING)

    # ------------------------------------------------------------ BlockMemory, UnitSender

    def block_bytes(self, block_id: int) -> memoryview:
        return memoryview(self.memory[block_id])

    def begin_io(self, handle: BlockHandle) -> bool:
        return self.pool.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        self.pool.end_io(handle.block_id)

    def reaches(self, url: str, to: NodeId) -> bool:
        return True

    def send(
        self,
        url: str,
        to: NodeId,
        header: UnitHeader,
        payload: memoryview,
        on_done: Callable[[], None],
    ) -> None:
        if type(payload.obj) is not bytearray:  # a partial unit was gathered: a copy of its own
            payload = memoryview(bytearray(payload))
            assert isinstance(on_done, partial)
            on_done = partial(on_done.func, on_done.args[0], payload)  # what it holds until then
        self.sends.append(Send(header, to, payload, on_done, bytes(payload)))

    def close(self) -> None:
        """Nothing to close."""

    def carry_out(self, send: Send) -> None:
        data = bytes(send.payload)
        must(data == send.sealed, "a send reads what another request has written")
        self.out.append(Packet(self.me, send.to, send.header, data))
        send.on_done()

    def post(self, grant: Grant, message: Message) -> None:
        self.out.append(Packet(self.me, grant.decode, message))

    def answer(self, to: NodeId, message: Message) -> None:
        self.out.append(Packet(self.me, to, message))

    # ------------------------------------------------------------ what must hold

    def check(self) -> None:
        self.pool.check_integrity()
        held = sum(len(work.block_ids) for work in self.work.values())
        must(held == self.pool.num_references(Owner.RUNNING), "blocks are held for nobody")
        must(len(self.sender) == len(self.work), "a handoff without a request, or the reverse")
        for out in self.sender._outgoing.values():
            on_the_way = out.handoff.bytes_sent - self.work[out.handoff.id.request].credit
            most = max(self.window_bytes, LAYOUT.block_bytes)
            must(on_the_way <= most, f"{on_the_way} bytes are on the way: more than the window")

    def drain(self) -> None:
        """Everything is lost; sends end, time passes: all blocks must come back."""
        self.now += DEADLINE_S
        self.sender.tick()
        quarantined = self.pool.counts().quarantined
        must(quarantined <= len(self.sends), "blocks are quarantined for no transfer")
        while self.sends:
            self.carry_out(self.sends.pop())
        self.check()
        free = self.pool.counts().free
        must(free == self.pool.num_blocks, f"blocks have leaked: {self.pool.counts()}")
        states = {self.pool.state(block_id) for block_id in range(self.pool.num_blocks)}
        must(states == {BlockState.FREE}, "not all blocks are free")
