"""A node without an engine: it speaks the protocol, and a test or a benchmark says the rest."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import zmq

from wire.codec import Envelope
from wire.errors import WireError
from wire.fleet_messages import (
    CacheEvents,
    FetchCacheSnapshot,
    FetchTokenizer,
    Gone,
    Heartbeat,
    ModelInfo,
    Register,
    RouterHeartbeat,
    TokenizerFiles,
    Unwelcome,
    Welcome,
)
from wire.layout import KVLayout
from wire.messages import Message
from wire.sockets import Link
from wire.types import NodeId, NodeLoad, Role

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, block_size=16, dtype="float32")


def model_info(vocab_size: int, max_model_len: int = 2048, name: str = "stub") -> ModelInfo:
    """A model that every stub node claims to have."""
    return ModelInfo(name, "stub-fingerprint", "stub", max_model_len, vocab_size, (0,))


class StubNode:
    """One registered node; `handle` gets what the router sends."""

    def __init__(
        self,
        role: Role,
        router_url: str,
        model: ModelInfo,
        tokenizer: TokenizerFiles,
        context: zmq.Context[Any],
        *,
        name: str = "",
        layout: KVLayout = LAYOUT,
        num_blocks: int = 4096,
    ) -> None:
        self.id = NodeId(name or role.value, secrets.randbits(64))
        self.role = role
        self.received: list[Message] = []  # requests' messages, for tests
        self.control_ports: tuple[int, ...] = ()  # of all workers of the router
        self.refusal: str | None = None
        self.handle: Callable[[Message], None] = lambda message: None
        self._tokenizer = tokenizer
        self._register = Register(role, model, layout, num_blocks, "tcp://stub", (), "http://stub")
        self._load = NodeLoad(blocks_total=num_blocks, blocks_free=num_blocks)
        self._router: NodeId | None = None
        self._link = Link(self.id, router_url, self._receive, context)
        self._beat = asyncio.create_task(self._live())

    @property
    def registered(self) -> bool:
        return self._router is not None

    def send(self, message: Message) -> None:
        """Send to the router; a stub that nobody reads loses its message."""
        try:
            self._link.send(message, self._router)
        except WireError:
            self._router = None

    def set_load(self, load: NodeLoad) -> None:
        self._load = load

    async def close(self) -> None:
        """Without a word, like a killed process."""
        self._beat.cancel()
        await asyncio.gather(self._beat, return_exceptions=True)
        self._link.close()

    async def _live(self) -> None:
        while self.refusal is None:
            self.send(self._register if self._router is None else Heartbeat(self._load))
            await asyncio.sleep(0.05)

    def _receive(self, envelope: Envelope) -> None:
        message = envelope.message
        if isinstance(message, Welcome):
            self._router = envelope.sender
            self.control_ports = message.control_ports
        elif isinstance(message, Unwelcome):
            self.refusal = message.reason
        elif isinstance(message, Gone):
            self._router = None
        elif isinstance(message, FetchTokenizer):
            self.send(self._tokenizer)
        elif isinstance(message, FetchCacheSnapshot):
            self.send(CacheEvents(0, (), (), snapshot=True))
        elif not isinstance(message, RouterHeartbeat):
            self.received.append(message)
            del self.received[:-10_000]
            self.handle(message)
