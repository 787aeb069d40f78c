"""One prefill node's sender and one decode node's receiver, with a clock that tests move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.handoff import Handoff
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.loopback import Faults, LoopbackNetwork, no_faults
from kvtransfer.receiver import KVReceiver
from kvtransfer.sender import KVSender
from kvtransfer.transport import TransferStats, UnitSender
from tests.kvtransfer.pool import Pool
from wire.codec import Envelope, decode, encode
from wire.errors import BatonError, WireError
from wire.geometry import WHOLE_BLOCKS, Geometry
from wire.handoff_messages import UnitHeader
from wire.layout import KVLayout
from wire.messages import Message
from wire.request_messages import Grant
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
PREFILL = NodeId("prefill", 1)
DECODE = NodeId("decode", 2)
TTL = 10.0
ID = AttemptId("request", 1)


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


def header(**other: Any) -> UnitHeader:
    """Of the first unit of the rig's target pool, unless told otherwise."""
    values: dict[str, Any] = {
        "lease": 1,
        "capability": b"c" * 16,
        "unit": 0,
        "handle": BlockHandle(22, 0, 1),
        "token_start": 0,
        "token_end": 4,
        "num_bytes": LAYOUT.block_bytes,
    }
    return UnitHeader(**values | other)


def nothing() -> None:
    """What is to be done when a send is over."""


def nothing_lost(message: Message) -> bool:
    """The default of `Rig.loses`."""
    return False


@dataclass
class Job:
    """One request on both sides."""

    id: AttemptId
    tokens: tuple[int, ...]
    num_cached_tokens: int
    grant: Grant
    lease: Lease
    source: tuple[BlockHandle, ...]
    target: tuple[BlockHandle, ...]


@dataclass
class Rig:
    """Messages travel through the codec and the loop; units through the given transport.

    `loses` decides which messages get lost. Blocks of leases that were not committed are freed, as
    the decode role does.
    """

    layout: KVLayout = LAYOUT
    geometry: Geometry = WHOLE_BLOCKS
    source_layout: KVLayout | None = None  # None: the same
    make_pool: type[Pool] = Pool
    faults: Faults = no_faults
    window_bytes: int = 32 << 20
    max_sending_bytes: int = 0
    now: float = 0.0
    loses: Callable[[Message], bool] = nothing_lost
    loss: BatonError = field(default_factory=lambda: WireError("the test lost it"))
    handoffs: list[Handoff] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    heard_by_decode: list[Message] = field(default_factory=list)
    heard_by_prefill: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.source = self.make_pool(self.source_layout or self.layout, epoch=11)
        self.target = self.make_pool(self.layout, epoch=22)
        self.sent, self.received = TransferStats(), TransferStats()
        self.receiver = KVReceiver(
            memory=self.target,
            table=LeaseTable(ttl_s=TTL),
            send=lambda to, message: self.to_prefill(message),
            on_ended=self._lease_ended,
            model_fingerprint="model",
            stats=self.received,
            clock=lambda: self.now,
        )
        self.network = LoopbackNetwork(self.faults)
        self.use(self.network.sender(PREFILL), self.network.receiver(self.receiver).address)

    def use(self, unit_sender: UnitSender, address: TransportAddress) -> None:
        """Send units by this transport."""
        self.address = address
        self.sender = KVSender(
            memory=self.source,
            transports={address.transport: unit_sender},
            send=lambda grant, message: self.to_decode(message),
            on_ended=self.handoffs.append,
            model_fingerprint="model",
            stats=self.sent,
            window_bytes=self.window_bytes,
            max_sending_bytes=self.max_sending_bytes,
            clock=lambda: self.now,
        )

    # ------------------------------------------------------------ messages

    def to_decode(self, message: Message) -> None:
        self._post(PREFILL, DECODE, message, self.heard_by_decode, self.receiver.handle)

    def to_prefill(self, message: Message) -> None:
        self._post(DECODE, PREFILL, message, self.heard_by_prefill, self.sender.handle)

    def _post(
        self,
        sender: NodeId,
        to: NodeId,
        message: Message,
        heard: list[Message],
        handle: Callable[[NodeId, Message], None],
    ) -> None:
        data = encode(Envelope(sender, to, message))
        if self.loses(message):
            raise self.loss if to == DECODE else WireError("the test lost it")

        def arrive() -> None:
            envelope = decode(data)
            heard.append(envelope.message)
            handle(envelope.sender, envelope.message)

        asyncio.get_running_loop().call_soon(arrive)

    # ------------------------------------------------------------ a request's life

    def reserve(
        self,
        num_tokens: int,
        *,
        id: AttemptId = ID,
        sender: NodeId = PREFILL,
        num_cached_tokens: int = 0,
        rebinds: bool = False,
    ) -> Job:
        tokens = tuple(range(100, 100 + num_tokens))
        count = self.layout.num_blocks(num_tokens)
        target = self.target.filled(count, seed=1)
        lease = self.receiver.grant(
            id,
            sender=sender,
            tokens=tokens,
            num_cached_tokens=num_cached_tokens,
            handles=target,
            cache_salt="salt",
            deadline_s=100.0,
            geometry=self.geometry,
            rebinds=rebinds,
        )
        grant = Grant(
            lease=lease.number,
            capability=lease.capability,
            digest_key=lease.digest_key,
            decode=DECODE,
            peer_url="peer",
            transports=(self.address,),
            layout=self.layout,
            handles=target,
            num_cached_tokens=num_cached_tokens,
            ttl_s=TTL,
            geometry=self.geometry,
        )
        count = self.source.layout.num_blocks(num_tokens)
        source = self.source.filled(count, seed=lease.number + 100)
        return Job(id, tokens, num_cached_tokens, grant, lease, source, target)

    def start(self, job: Job) -> None:
        self.sender.start(job.id, job.grant, tokens=job.tokens, cache_salt="salt", deadline_s=100.0)

    def compute(self, job: Job, indices: Sequence[int]) -> None:
        """The prefill node has finished these blocks."""
        self.sender.blocks_finished(job.id, [(index, job.source[index]) for index in indices])

    def hand_over(self, job: Job) -> None:
        """All of it, in two chunks and the first token."""
        self.start(job)
        half = len(job.source) // 2
        self.compute(job, range(half))
        self.compute(job, range(half, len(job.source)))
        self.sender.first_token(job.id, (7,))

    async def hand_over_well(self, num_tokens: int, request: str = "last") -> Job:
        """A handoff that must work, whatever came before it."""
        job = self.reserve(num_tokens, id=AttemptId(request, 1))
        self.hand_over(job)
        await self.until_ended()
        assert job.lease.state is LeaseState.COMMITTED
        assert self.identical(job)
        self.check_balance()
        return job

    async def check_rejected(self, units: UnitSender, payload: memoryview) -> bool:
        """A payload that is not as long as its unit ends its lease, and changes no other block.

        Returns whether it changed its own.
        """
        job = self.reserve(4)
        before = [bytes(block) for block in self.target.blocks]
        self.start(job)
        lie = header(capability=job.lease.capability, handle=job.target[0], num_bytes=len(payload))
        units.send(self.address.url, DECODE, lie, payload, nothing)
        await self.until_ended()
        assert (job.lease.state, job.lease.cause) == (LeaseState.REJECTED, "transport")
        assert [bytes(block) for block in self.target.blocks[1:]] == before[1:]
        self.check_balance()
        return bytes(self.target.blocks[0]) != before[0]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.sender.tick()
        self.receiver.tick()

    async def until_ended(self) -> None:
        """Both sides are done with everything, and no transfer touches a block."""
        await until(lambda: not len(self.sender) and not len(self.receiver.table))
        await until(lambda: not self.source.touched and not self.target.touched)

    def _lease_ended(self, lease: Lease) -> None:
        self.leases.append(lease)
        if lease.state is not LeaseState.COMMITTED:
            self.target.release(lease.handles)

    # ------------------------------------------------------------ what must hold

    def identical(self, job: Job) -> bool:
        """Whether the target holds what the source holds, from the first token not cached."""
        size = self.layout.block_size
        return all(
            self.source.content(job.source[i], n) == self.target.content(job.target[i], n)
            for i in range(job.num_cached_tokens // size, len(job.source))
            for n in [min(size, len(job.tokens) - i * size)]
        )

    def check_balance(self) -> None:
        """Nothing is held that nobody needs."""
        assert (self.source.touched, self.target.touched) == (0, 0)
        assert not self.source.quarantined
        assert not self.target.quarantined
        assert len(self.sender) == len(self.receiver.table) == 0
        assert not self.receiver._incoming
        held = sum(len(x.handles) for x in self.leases if x.state is LeaseState.COMMITTED)
        assert len(self.target.free_ids) + held == len(self.target.generations)


async def until(holds: Callable[[], object]) -> None:
    """Wait for something that happens in the loop or on libzmq's threads."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def quiet() -> None:
    """Let everything happen that is due now."""
    for _ in range(20):
        await asyncio.sleep(0)
