"""A prefill and a decode role in one process: real engines, sockets and blocks, scripted routers.

Nothing runs by itself: a test does each engine's steps, so that it can put an event anywhere
between a step, its result and what follows. KV is a chain of hashes in a real block store (see
tests/engine/hash_runner.py), so a decode node that got wrong bytes fails at its first step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar, cast

import torch
import zmq
from torch import Tensor

from decode_node.role import DecodeRole
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.staging import Staging
from engine.unit_copies import UnitCopies, WhenOver
from kvtransfer.device_pool import HostDeviceMapping, HostDevicePool
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transport import TransferStats
from node.build import BuiltEngine
from node.config import NodeConfig
from node.memory import NodeMemory
from node.mixed_role import MixedRole
from node.router_link import RouterLink
from node.shell import NodeShell
from node.staged_memory import StagedMemory
from node.stats import NodeStats
from prefill_node.role import PrefillRole
from tests.engine.hash_runner import VOCAB_SIZE, HashRunner, expected_output
from wire.codec import Envelope, decode, encode
from wire.layout import KVLayout
from wire.messages import Message
from wire.request_messages import (
    Ack,
    AttemptFailed,
    Grant,
    Granted,
    Prefill,
    Refused,
    Reserve,
    Tokens,
    TokenUpdate,
)
from wire.sockets import Hub
from wire.types import AttemptId, FinishReason, NodeId, SamplingParams

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")
ROUTER = NodeId("router", 1)
SAMPLING = SamplingParams(seed=5, max_tokens=6, ignore_eos=True)
ID = AttemptId("request", 1)
SCRATCH_BYTES = 2 * LAYOUT.block_bytes  # so that larger copies come in pieces
PROMPT = tuple(range(1, 11))  # two full blocks and a half


class StoreRunner(HashRunner):
    """Keeps each slot's hash in the keys of a real store, in every layer, one after the other."""

    def __init__(self, store: KVStore) -> None:
        super().__init__(0, store.layout.block_size)
        self.num_layers = store.layout.num_layers
        self._slots = store.blocks.view(torch.int64)[:, :, 0, :, 0, 0]  # [block, layer, slot]
        self._written: list[tuple[int, int]] = []  # block and slot, in this step

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        def layer_done(num_layers: int) -> None:
            if on_layers is not None:
                on_layers(num_layers)
            for block, slot in self._written if num_layers < self.num_layers else ():
                self._slots[block, num_layers, slot] = self._slots[block, 0, slot]

        self._written.clear()
        return super().run(plan, layer_done, on_hidden, sampled)

    def copy(self, source: int, target: int) -> None:
        self._slots[target] = self._slots[source]

    def read(self, block_id: int, position: int) -> int:
        states = set(self._slots[block_id, :, position % self._block_size].tolist())
        assert len(states) == 1, f"layers of block {block_id} differ: {states}"
        return int(states.pop())

    def write(self, block_ids: Sequence[int], states: Sequence[int], start: int) -> None:
        for position in range(start, len(states)):
            block, slot = block_ids[position // self._block_size], position % self._block_size
            self._slots[block, :, slot] = -1
            self._slots[block, 0, slot] = states[position]
            self._written.append((block, slot))


def later(tell: Callable[[], None]) -> None:
    """Copies of a device are over some time after they were launched."""
    loop = asyncio.get_running_loop()
    loop.call_later(0.002, tell)


def build(
    config: NodeConfig,
    num_blocks: int,
    max_model_len: int,
    staging_blocks: int = 0,
    when_over: WhenOver = later,
) -> BuiltEngine:
    """With `staging_blocks` as on a device: blocks travel through memory for so many."""
    device_pool = None
    if config.transport == "cuda-ipc":
        device_pool = HostDevicePool(num_blocks * LAYOUT.block_bytes)
    store = KVStore(LAYOUT, num_blocks, buffer=device_pool.buffer if device_pool else None)
    store.blocks.fill_(float("nan"))  # a pool's memory may still hold an earlier test's blocks
    engine = Engine(
        EngineConfig(
            block_size=LAYOUT.block_size,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_overcommit=config.kv_overcommit,
            enable_prefix_caching=config.enable_prefix_caching,
            lookahead=config.async_scheduling,
        ),
        StoreRunner(store),
        epoch=num_blocks,
        model_fingerprint="hash",
        eos_token_ids=frozenset({0}),
    )
    model = SimpleNamespace(
        fingerprint="hash",
        numerics="exact",
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(0,),
        can_embed=True,
    )
    if not staging_blocks:
        return BuiltEngine(config, cast(Any, model), engine, NodeMemory(engine, store), num_blocks)
    pool = SharedMemory(staging_blocks * LAYOUT.block_bytes)
    staging = Staging(len(pool), pool.buffer, pinned=False)
    copies = UnitCopies(store, staging, when_over=when_over, scratch_bytes=SCRATCH_BYTES)
    shared = device_pool is not None
    memory = StagedMemory(engine, store, staging, copies, shared=shared)
    return BuiltEngine(
        config,
        cast(Any, model),
        engine,
        memory,
        num_blocks,
        pool,
        device_pool,
        HostDeviceMapping if shared else None,
    )


class FakeShell:
    """What a role needs of its shell."""

    def __init__(self, name: str, context: zmq.Context[Any], built: BuiltEngine) -> None:
        self.me = NodeId(name, 7)
        self.context = context
        self.built = built
        self.config = built.config
        self.engine = built.engine
        self.stats = NodeStats()
        self.transfers = TransferStats()
        self.role: Role | None = None
        self.hub = Hub(self.me, self.config.bind_url, self._from_peer, context)

    @property
    def peer_url(self) -> str:
        return self.public_url(self.hub.url)

    def public_url(self, url: str) -> str:
        return self.config.url("tcp", url)

    def send_peer(self, to: NodeId, message: Message) -> None:
        self.hub.send(to, message)

    def wake(self) -> None:
        pass

    def _from_peer(self, envelope: Envelope) -> None:
        assert self.role is not None
        self.role.handle_peer(envelope.sender, envelope.message)


Role = PrefillRole | DecodeRole | MixedRole
R = TypeVar("R", PrefillRole, DecodeRole, MixedRole)


class FakeLink:
    """A registered router. What it is told goes through the codec, as it would on the wire."""

    def __init__(self) -> None:
        self.heard: list[Message] = []
        self.on_lost: Callable[[RouterLink], None] | None = None  # called by the next `send`

    def send(self, message: Message) -> bool:
        if self.on_lost is not None:
            lost, self.on_lost = self.on_lost, None
            self.send = lambda message: False  # type: ignore[method-assign]
            lost(cast(RouterLink, self))
            return False
        self.heard.append(decode(encode(Envelope(NodeId("node", 1), ROUTER, message))).message)
        return True

    def failures(self, id: AttemptId = ID) -> list[AttemptFailed]:
        return [m for m in self.heard if isinstance(m, AttemptFailed) and m.id == id]

    def updates(self, id: AttemptId = ID) -> list[TokenUpdate]:
        messages = [m for m in self.heard if isinstance(m, Tokens)]
        return [u for message in messages for u in message.updates if u.id == id]

    def output(self, id: AttemptId = ID) -> tuple[list[int], FinishReason | None]:
        """All tokens of an attempt, each once, and how it ended."""
        tokens: list[int] = []
        finish = None
        for update in self.updates(id):
            assert update.index <= len(tokens), "a gap"
            tokens[update.index :] = update.tokens
            finish = update.finish
        return tokens, finish


class Node(Generic[R]):
    """One role in a shell that a test drives."""

    def __init__(self, make_role: Callable[[NodeShell], R], shell: FakeShell) -> None:
        self.shell = shell
        self.engine = shell.engine
        self.role: R = make_role(cast(NodeShell, shell))
        shell.role = self.role
        self.link = FakeLink()

    def tell(self, message: Message, link: FakeLink | None = None) -> None:
        """A router says something."""
        data = encode(Envelope(ROUTER, self.shell.me, message))
        self.role.handle(cast(RouterLink, link or self.link), decode(data).message)

    def step(self) -> StepResult | None:
        """One step of the engine; the role has not heard of it yet."""
        return self.engine.step(self.role.on_layers) if self.engine.has_work() else None

    def work(self) -> bool:
        """One step, and what follows; False if there was none."""
        result = self.step()
        if result is not None:
            self.shell.stats.count_step(result)
            self.role.on_step(result)
        return result is not None

    def check_balance(self) -> None:
        self.engine.check_integrity()
        counts = self.engine.block_counts()
        assert counts.free + counts.cached == counts.total, counts

    @property
    def balanced(self) -> bool:
        counts = self.engine.block_counts()
        return counts.free + counts.cached == counts.total

    def close(self) -> None:
        self.role.close()
        self.shell.hub.close()


class Pair:
    """A prefill node and a decode node that hand over to each other."""

    def __init__(
        self,
        context: zmq.Context[Any],
        prefill_blocks: int,
        decode_blocks: int,
        max_model_len: int,
        staging_blocks: int = 0,
        when_over: WhenOver = later,
        **settings: Any,
    ) -> None:
        config = NodeConfig(Path(), "node", **settings)
        built = partial(
            build,
            config,
            max_model_len=max_model_len,
            staging_blocks=staging_blocks,
            when_over=when_over,
        )
        self.prefill: Node[PrefillRole] = Node(
            PrefillRole,
            FakeShell("prefill", context, built(prefill_blocks)),
        )
        self.decode: Node[DecodeRole] = Node(
            DecodeRole,
            FakeShell("decode", context, built(decode_blocks)),
        )

    # ------------------------------------------------------------ what a router does

    def reserve(
        self,
        id: AttemptId = ID,
        tokens: tuple[int, ...] = PROMPT,
        sampling: SamplingParams = SAMPLING,
        **more: Any,
    ) -> Granted | Refused:
        """The decode node's answer to a Reserve."""
        num_prompt = more.pop("num_prompt_tokens", len(tokens))
        self.decode.tell(Reserve(id, tokens, num_prompt, sampling, self.prefill.shell.me, **more))
        answer = self.decode.link.heard[-1]
        assert isinstance(answer, Granted | Refused)
        assert answer.id == id
        return answer

    def grant(self, id: AttemptId = ID, *args: Any, **more: Any) -> Grant:
        answer = self.reserve(id, *args, **more)
        assert isinstance(answer, Granted), answer
        return answer.grant

    def start(
        self,
        grant: Grant | None,
        id: AttemptId = ID,
        tokens: tuple[int, ...] = PROMPT,
        sampling: SamplingParams = SAMPLING,
        **more: Any,
    ) -> None:
        num_prompt = more.pop("num_prompt_tokens", len(tokens))
        self.prefill.tell(Prefill(id, tokens, num_prompt, sampling, grant, **more))

    def both(self, message: Message) -> None:
        """Say it to both nodes."""
        for node in (self.prefill, self.decode):
            node.tell(message)

    # ------------------------------------------------------------ what happens by itself

    def turn(self) -> None:
        """A step on both nodes, and a tick."""
        self.prefill.work()
        self.decode.work()
        self.prefill.role.tick()
        self.decode.role.tick()

    async def until(self, holds: Callable[[], object]) -> None:
        """Let everything go on until `holds`."""
        async with asyncio.timeout(20):
            while not holds():
                self.turn()
                await asyncio.sleep(0.001)

    async def hear(self, holds: Callable[[], object]) -> None:
        """Let messages arrive, but nobody step, until `holds`."""
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def finish(self, id: AttemptId = ID) -> tuple[list[int], FinishReason | None]:
        """The decode node's whole output, acknowledged."""
        await self.until(lambda: self.decode.link.output(id)[1])
        self.decode.tell(Ack(id))
        return self.decode.link.output(id)

    async def settle(self) -> None:
        """Nothing is left of anything on either node; blocks are free or cached."""
        await self.until(lambda: self.prefill.balanced and self.decode.balanced)
        for node in (self.prefill, self.decode):
            node.check_balance()
            assert node.role.num_attempts == 0
        assert len(self.prefill.role._sender) == 0
        assert len(self.decode.role._receiver.table) == 0
        assert not self.decode.role._receiver._incoming


@asynccontextmanager
async def pair(
    *,
    prefill_blocks: int = 32,
    decode_blocks: int = 24,
    max_model_len: int = 64,
    **settings: Any,
) -> AsyncIterator[Pair]:
    """A pair whose books must balance at the end."""
    context: zmq.Context[Any] = zmq.Context()
    made = Pair(context, prefill_blocks, decode_blocks, max_model_len, **settings)
    try:
        yield made
        await made.settle()
    finally:
        made.prefill.close()
        made.decode.close()
        context.destroy(0)


def expected(
    tokens: tuple[int, ...] = PROMPT, sampling: SamplingParams = SAMPLING
) -> tuple[list[int], FinishReason | None]:
    """What one node alone would answer."""
    limit = min(64, len(tokens) + sampling.max_tokens)
    request = Request("alone", list(tokens), len(tokens), sampling, limit)
    return expected_output(request, frozenset({0}))
