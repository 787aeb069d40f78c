"""One end of a handoff over UCX in a process of its own: `python -m tests.kvtransfer.ucx_peer`.

Both ends have a pool and talk over a PAIR socket in frames [kind, ...]; the messages of the
protocol go through the codec, the units over UCX. The parent runs the other end with these same
classes, and may kill or stop this process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import zmq

from kvtransfer.handoff import Handoff
from kvtransfer.lease import Lease, LeaseState
from kvtransfer.lease_table import LeaseTable
from kvtransfer.receiver import KVReceiver
from kvtransfer.sender import KVSender
from kvtransfer.transport import TransferStats
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from tests.kvtransfer.pool import Pool
from wire.codec import Envelope, decode, encode
from wire.errors import TransferError, WireError
from wire.layout import KVLayout
from wire.messages import Message
from wire.polled import PolledSocket
from wire.request_messages import Grant, Granted
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress

TTL = 3600.0
PREFILL = NodeId("prefill", 1)
DECODE = NodeId("decode", 2)


def layout(kib: int) -> KVLayout:
    """A layout whose blocks have `kib` KiB, in 4 slots."""
    return KVLayout(num_layers=2, num_kv_heads=2, head_dim=kib * 8, block_size=4, dtype="float32")


def num_blocks(kib: int) -> int:
    return min(208, (128 << 10) // kib)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(range(100, 100 + count))


class Post:
    """The PAIR socket; `handlers` are called with the frames behind the kind."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.handlers: dict[bytes, Callable[..., None]] = {}
        self._polled = PolledSocket(socket, self._receive_one)

    def send(self, kind: bytes, *frames: bytes) -> None:
        try:
            self._polled.send([kind, *frames])
        except zmq.Again as error:
            raise WireError("the other process is gone") from error

    def close(self) -> None:
        self._polled.close(0)

    def _receive_one(self, socket: zmq.Socket[bytes]) -> None:
        kind, *frames = socket.recv_multipart(zmq.NOBLOCK)
        self.handlers[kind](*frames)


class DecodeEnd:
    """Grants what it is asked for, and tells what it holds."""

    def __init__(self, post: Post, kib: int, stall_s: float = 30.0) -> None:
        self.post = post
        self.pool = Pool(layout(kib), num_blocks(kib), epoch=22)
        self.leases: list[Lease] = []
        self.stats = TransferStats()
        self.receiver = KVReceiver(
            memory=self.pool,
            table=LeaseTable(ttl_s=TTL),
            send=lambda to, message: self._send(message),
            on_ended=self._ended,
            model_fingerprint="model",
            stats=self.stats,
        )
        self.units = UcxUnitReceiver(DECODE, self.receiver, self.stats, stall_s=stall_s)
        post.handlers[b"reserve"] = self._reserve
        post.handlers[b"to decode"] = self._heard
        post.handlers[b"look"] = self._look

    def grant(self, name: str, num_tokens: int) -> Grant:
        handles = self.pool.allocate(self.pool.layout.num_blocks(num_tokens))
        lease = self.receiver.grant(
            AttemptId(name, 1),
            sender=PREFILL,
            tokens=tokens(num_tokens),
            num_cached_tokens=0,
            handles=handles,
            cache_salt="salt",
            deadline_s=TTL,
        )
        return Grant(
            lease=lease.number,
            capability=lease.capability,
            digest_key=lease.digest_key,
            decode=DECODE,
            peer_url="peer",
            transports=(self.units.address,),
            layout=self.pool.layout,
            handles=handles,
            num_cached_tokens=0,
            ttl_s=TTL,
        )

    def close(self) -> None:
        self.units.close()

    def reserve(self, name: str, num_tokens: int) -> None:
        """Grant a handoff and tell the prefill end, which begins at once."""
        granted = Granted(AttemptId(name, 1), self.grant(name, num_tokens))
        data = encode(Envelope(DECODE, PREFILL, granted))
        self.post.send(b"granted", data, str(num_tokens).encode())

    def _reserve(self, name: bytes, num_tokens: bytes) -> None:
        self.reserve(name.decode(), int(num_tokens.decode()))

    def _heard(self, data: bytes) -> None:
        envelope = decode(data)
        self.receiver.handle(envelope.sender, envelope.message)

    def _send(self, message: Message) -> None:
        self.post.send(b"to prefill", encode(Envelope(DECODE, PREFILL, message)))

    def _ended(self, lease: Lease) -> None:
        self.leases.append(lease)
        if lease.state is not LeaseState.COMMITTED:
            self.pool.release(lease.handles)

    def _look(self, block_id: bytes) -> None:
        """Answer with a block's content and how many transfers touch the pool."""
        block = self.pool.blocks[int(block_id.decode())]
        self.post.send(b"seen", bytes(block), str(self.pool.touched).encode())


class PrefillEnd:
    """Hands over whatever is granted, from blocks full of noise."""

    def __init__(self, post: Post, kib: int, stall_s: float = 30.0) -> None:
        self.post = post
        self.pool = Pool(layout(kib), num_blocks(kib), epoch=11)
        self.stats = TransferStats()
        self.grants: dict[str, Grant] = {}
        self.source: dict[str, tuple[BlockHandle, ...]] = {}
        self.ended: dict[str, Handoff] = {}
        self.units = UcxUnitSender(PREFILL, on_lost=self._lost, stall_s=stall_s)
        self.sender = KVSender(
            memory=self.pool,
            transports={"ucx": self.units},
            send=lambda grant, message: self._send(message),
            on_ended=self._on_ended,
            model_fingerprint="model",
            stats=self.stats,
        )
        post.handlers[b"granted"] = self._granted
        post.handlers[b"to prefill"] = self._heard

    def hand_over(self, name: str, grant: Grant, num_tokens: int) -> None:
        self.grants[name] = grant
        self.source[name] = self.pool.filled(len(grant.handles), seed=grant.lease)
        id = AttemptId(name, 1)
        self.sender.start(id, grant, tokens=tokens(num_tokens), cache_salt="salt", deadline_s=TTL)
        self.sender.blocks_finished(id, list(enumerate(self.source[name])))
        self.sender.first_token(id, (7,))

    def close(self) -> None:
        self.units.close()

    def _lost(self, address: TransportAddress, error: TransferError) -> None:
        self.sender.lost(address, error)

    def _granted(self, data: bytes, num_tokens: bytes) -> None:
        message = decode(data).message
        assert isinstance(message, Granted)
        self.hand_over(message.id.request, message.grant, int(num_tokens.decode()))

    def _heard(self, data: bytes) -> None:
        envelope = decode(data)
        self.sender.handle(envelope.sender, envelope.message)

    def _send(self, message: Message) -> None:
        self.post.send(b"to decode", encode(Envelope(PREFILL, DECODE, message)))

    def _on_ended(self, handoff: Handoff) -> None:
        self.ended[handoff.id.request] = handoff


async def main(role: str, url: str, kib: int) -> None:
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(url)
    post = Post(socket)
    over = asyncio.Event()
    post.handlers[b"end"] = over.set
    stall_s = 0.5 if "impatient" in sys.argv else 30.0
    end = (DecodeEnd if role == "decode" else PrefillEnd)(post, kib, stall_s)
    post.send(b"ready", str(isinstance(end, DecodeEnd) and end.units.address.url).encode())
    await over.wait()
    end.close()
    post.close()
    context.term()


if __name__ == "__main__":
    if "torch" in sys.argv:
        import torch

        assert torch.ones(64, 64).matmul(torch.ones(64, 64)).sum() == 64**3
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
