"""The prefill node of bench_transfer: a process of its own that hands blocks over when told to.

It is told by `Prefill` messages, as a prefill node is by a router; the blocks are there already.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zmq

import kvtransfer.block_memory
import kvtransfer.receiver
import kvtransfer.sender
from engine.kv_store import KVStore
from kvtransfer.block_memory import InPlace
from kvtransfer.sender import KVSender
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitSender
from kvtransfer.transport import TransferStats, UnitSender
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.units import Unit
from kvtransfer.zmq_transport import ZmqUnitSender
from wire.codec import Envelope
from wire.handoff_messages import RenewLeases
from wire.layout import KVLayout
from wire.messages import Message
from wire.request_messages import Prefill
from wire.sockets import Link
from wire.types import BlockHandle, NodeId

TOKENS_PER_BLOCK, KV_HEADS, HEAD_DIM = 16, 2, 64
BYTES_PER_LAYER = 2 * TOKENS_PER_BLOCK * KV_HEADS * HEAD_DIM * 4
WINDOW_BYTES = 64 << 20


class NoSealer:
    """Stands in for UnitSealer where the digests' cost is measured by leaving them out."""

    seed = 0

    def __init__(self, **_: object) -> None:
        pass

    def digest(self, unit: Unit, data: bytes | memoryview) -> bytes:
        return self.seal(unit, no_content(data, self.seed))

    def seal(self, unit: Unit, content: bytes) -> bytes:
        return bytes(16)

    def copy(self, data: memoryview, target: memoryview) -> bytes:
        target[:] = data
        return no_content(data, self.seed)


def no_content(data: bytes | memoryview, seed: int) -> bytes:
    """Stands in for the pass over a unit's bytes."""
    return bytes(16)


def leave_digests_out() -> None:
    """In this process, from now on."""
    for module in (kvtransfer.sender, kvtransfer.receiver):
        vars(module)["UnitSealer"] = NoSealer
    vars(kvtransfer.block_memory)["content_of"] = no_content


def layout_of(block_bytes: int) -> KVLayout:
    return KVLayout(
        num_layers=block_bytes // BYTES_PER_LAYER,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        block_size=TOKENS_PER_BLOCK,
        dtype="float32",
    )


class Blocks(InPlace):
    """Implements BlockMemory over a store whose blocks are never reused."""

    def __init__(self, store: KVStore) -> None:
        self.store = store
        self.layout = store.layout
        self.handles = tuple(BlockHandle(1, i, 1) for i in range(store.num_blocks))

    def block_bytes(self, block_id: int) -> memoryview:
        return self.store.block_bytes(block_id)

    def begin_io(self, handle: BlockHandle) -> bool:
        return True

    def end_io(self, handle: BlockHandle) -> None:
        pass


class SenderNode:
    """One prefill node with full blocks and one transport."""

    def __init__(self, url: str, transport: str, layout: KVLayout, num_blocks: int) -> None:
        self.me = NodeId("sender", secrets.randbits(64))
        context: zmq.Context[Any] = zmq.Context()
        pool = SharedMemory(num_blocks * layout.block_bytes)
        self.blocks = Blocks(KVStore(layout, num_blocks, buffer=pool.buffer))
        self.blocks.store.blocks.normal_()
        make: dict[str, Callable[[], UnitSender]] = {
            "shm": lambda: ShmUnitSender(self.me, pool),
            "zmq": lambda: ZmqUnitSender(self.me, context),
            "ucx": lambda: UcxUnitSender(self.me),
        }
        self.link = Link(self.me, url, self.receive, context)
        self.sender = KVSender(
            memory=self.blocks,
            transports={transport: make[transport]()},
            send=lambda grant, message: self.link.send(message, grant.decode),
            on_ended=lambda handoff: None,
            model_fingerprint="model",
            stats=TransferStats(),
            window_bytes=WINDOW_BYTES,
        )
        self.link.send(RenewLeases(()), None)  # "here I am"

    def receive(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Prefill):
            self.hand_over(message)
        else:
            self.sender.handle(envelope.sender, message)

    def hand_over(self, message: Message) -> None:
        assert isinstance(message, Prefill)
        assert message.grant is not None
        self.sender.start(
            message.id, message.grant, tokens=message.tokens, cache_salt="", deadline_s=600
        )
        self.sender.blocks_finished(message.id, list(enumerate(self.blocks.handles)))
        self.sender.first_token(message.id, (1,))


def send_bare(blocks: Blocks, port: int) -> None:
    """The floor of TCP: whoever connects and says a byte gets all blocks."""
    with socket.create_connection(("127.0.0.1", port)) as peer:
        while peer.recv(1):
            for handle in blocks.handles:
                peer.sendall(blocks.block_bytes(handle.block_id))


async def run(args: argparse.Namespace) -> None:
    layout = layout_of(args.block_bytes)
    node = SenderNode(args.url, args.transport, layout, args.num_blocks)
    floor = asyncio.get_running_loop().run_in_executor(None, send_bare, node.blocks, args.tcp_port)
    await floor  # until the receiver closes it, which is the end
    node.link.close()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--tcp-port", type=int, required=True)
    parser.add_argument("--transport", required=True)
    parser.add_argument("--block-bytes", type=int, required=True)
    parser.add_argument("--num-blocks", type=int, required=True)
    parser.add_argument("--no-digests", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.no_digests:
        leave_digests_out()
    asyncio.run(run(args))
    os._exit(0)  # the sockets of a benchmark need no last words


if __name__ == "__main__":
    main()
