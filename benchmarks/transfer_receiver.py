"""The decode node of bench_transfer: takes handoffs over, and times them beside their floor."""

from __future__ import annotations

import asyncio
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import zmq

import kvtransfer.block_memory
import kvtransfer.digest
import kvtransfer.receiver
from benchmarks.transfer_sender import Blocks, layout_of, leave_digests_out
from benchmarks.ucx_bare import BarePair
from engine.kv_store import KVStore
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.shm_transport import ShmUnitReceiver
from kvtransfer.transport import Landing, TransferStats, UnitReceiver
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.zmq_transport import ZmqUnitReceiver
from wire.codec import Envelope
from wire.geometry import geometry_for
from wire.handoff_messages import UnitHeader
from wire.request_messages import Grant, Prefill
from wire.sockets import Hub
from wire.types import AttemptId, NodeId, SamplingParams

FLOORS = {"shm": "memcpy", "zmq": "tcp", "ucx": "bare"}
"""What each transport is compared with."""


@dataclass(frozen=True)
class Case:
    """What is measured in one go."""

    transport: str
    block_bytes: int
    digests: bool

    @property
    def num_blocks(self) -> int:
        return min(2048, (64 << 20) // self.block_bytes)

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_units(self) -> int:
        """As nodes cut blocks of this size."""
        return self.num_blocks * geometry_for(layout_of(self.block_bytes)).num_layer_groups


@dataclass(frozen=True)
class Rates:
    """GB/s, medians over the rounds; the ratio as median over the rounds, and of the best ones.

    On a busy machine the median says how two processes and one thread get along with the others,
    and the best ones what the work itself costs.
    """

    transfer: float
    floor: float
    ratio: float
    best_ratio: float


class ReceiverNode:
    """One decode node. It is the sink of its transport, to see when the first unit comes."""

    def __init__(self, case: Case) -> None:
        self.me = NodeId("receiver", secrets.randbits(64))
        self.context: zmq.Context[Any] = zmq.Context()
        self.peer: asyncio.Future[NodeId] = asyncio.get_running_loop().create_future()
        self.hub = Hub(self.me, "tcp://127.0.0.1:*", self._receive, self.context)
        self.blocks = Blocks(KVStore(layout_of(case.block_bytes), case.num_blocks))
        self.blocks.store.blocks.zero_()
        self.geometry = geometry_for(self.blocks.layout)
        stats = TransferStats()
        self.receiver = KVReceiver(
            memory=self.blocks,
            table=LeaseTable(ttl_s=60.0),
            send=self.hub.send,
            on_ended=self._lease_ended,
            model_fingerprint="model",
            stats=stats,
        )
        make: dict[str, Callable[[], UnitReceiver]] = {
            "shm": lambda: ShmUnitReceiver(self.me, self, stats),
            "zmq": lambda: ZmqUnitReceiver(self.me, "tcp://127.0.0.1:*", self, stats, self.context),
            "ucx": lambda: UcxUnitReceiver(self.me, self, stats),
        }
        self.units = make[case.transport]()
        self.started = 0.0
        self.ended: asyncio.Future[Lease]

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> Landing | None:
        """See UnitSink."""
        if not self.started:
            self.started = time.perf_counter()
        return self.receiver.begin(sender, header, num_units)

    async def take_over(self, number: int) -> float:
        """One handoff of all blocks; returns its seconds."""
        sender = await self.peer
        prefill = self._prefill(AttemptId(f"request-{number}", 1), sender)
        self.started = 0.0
        self.ended = asyncio.get_running_loop().create_future()
        self.hub.send(sender, prefill)
        lease = await asyncio.wait_for(self.ended, 60)
        seconds = time.perf_counter() - self.started
        assert lease.state is LeaseState.COMMITTED, lease.cause
        return seconds

    def _prefill(self, id: AttemptId, sender: NodeId) -> Prefill:
        tokens = tuple(range(len(self.blocks.handles) * self.blocks.layout.block_size))
        lease = self.receiver.grant(
            id,
            sender=sender,
            tokens=tokens,
            num_cached_tokens=0,
            handles=self.blocks.handles,
            cache_salt="",
            deadline_s=60.0,
            geometry=self.geometry,
        )
        grant = Grant(
            lease=lease.number,
            capability=lease.capability,
            digest_key=lease.digest_key,
            decode=self.me,
            peer_url=self.hub.url,
            transports=(self.units.address,),
            layout=self.blocks.layout,
            handles=self.blocks.handles,
            num_cached_tokens=0,
            ttl_s=60.0,
            geometry=self.geometry,
        )
        return Prefill(
            id=id,
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(),
            cache_salt="",
            deadline_s=60.0,
            grant=grant,
        )

    def close(self) -> None:
        self.units.close()
        self.hub.close()
        self.context.destroy(0)

    def _receive(self, envelope: Envelope) -> None:
        if not self.peer.done():
            self.peer.set_result(envelope.sender)
        self.receiver.handle(envelope.sender, envelope.message)

    def _lease_ended(self, lease: Lease) -> None:
        self.ended.set_result(lease)


def seconds_of_memcpy(source: Blocks, target: Blocks) -> float:
    """One thread, block by block, as the transport does it."""
    pairs = [
        (source.block_bytes(h.block_id), target.block_bytes(h.block_id)) for h in target.handles
    ]
    started = time.perf_counter()
    for theirs, ours in pairs:
        ours[:] = theirs
    return time.perf_counter() - started


def seconds_of_tcp(peer: socket.socket, target: Blocks) -> float:
    """A bare socket, every block received where it belongs; from the first byte on."""
    views = [target.block_bytes(handle.block_id) for handle in target.handles]
    peer.send(b"x")
    peer.recv(1, socket.MSG_PEEK)
    started = time.perf_counter()
    for view in views:
        received = 0
        while received < len(view):
            received += peer.recv_into(view[received:])
    return time.perf_counter() - started


@contextmanager
def sender_process(case: Case, url: str) -> Iterator[socket.socket]:
    """The other process, and a bare connection to it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.transfer_sender"),
                *("--url", url, "--transport", case.transport),
                *("--tcp-port", str(server.getsockname()[1])),
                *("--block-bytes", str(case.block_bytes), "--num-blocks", str(case.num_blocks)),
                *([] if case.digests else ["--no-digests"]),
            ]
        )
        try:
            server.settimeout(60)
            peer, _ = server.accept()
            with peer:
                yield peer
        finally:
            process.terminate()
            process.wait(10)


async def measure(case: Case, rounds: int) -> Rates:
    """Handoff and floor in turns; the first round warms both up."""
    vars(kvtransfer.receiver)["UnitSealer"] = kvtransfer.digest.UnitSealer
    vars(kvtransfer.block_memory)["content_of"] = kvtransfer.digest.content_of
    if not case.digests:
        leave_digests_out()
    node = ReceiverNode(case)
    other = Blocks(KVStore(node.blocks.layout, case.num_blocks))
    other.store.blocks.normal_()
    times = []
    with sender_process(case, node.hub.url) as peer, ExitStack() as closing:
        floors_of: dict[str, Callable[[], float]] = {
            "shm": lambda: seconds_of_memcpy(other, node.blocks),
            "zmq": lambda: seconds_of_tcp(peer, node.blocks),
        }
        if case.transport == "ucx":
            targets = [node.blocks.block_bytes(h.block_id) for h in node.blocks.handles]
            pair = closing.enter_context(BarePair(targets))
            floors_of["ucx"] = pair.seconds
        for number in range(rounds + 1):
            transfer = await node.take_over(number)
            times.append((transfer, await asyncio.to_thread(floors_of[case.transport])))
    node.close()
    gigabytes = case.num_bytes / 1e9
    transfers, floors = zip(*times[1:], strict=True)
    return Rates(
        gigabytes / statistics.median(transfers),
        gigabytes / statistics.median(floors),
        statistics.median(floor / transfer for transfer, floor in times[1:]),
        min(floors) / min(transfers),
    )
