"""Handoffs over UCX for tests: with another process, within this one, with a stranger.

Importing it skips the test module where UCX cannot be loaded, and says why.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvtransfer.ucx_lane import HELLO_TAG, MAGIC, WELCOME_TAG, pack_hello, parse
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import DrivenWorker, array, new_context, settings, why_unavailable
from tests.kvtransfer.pool import filled
from tests.kvtransfer.rig import DECODE as RIG_DECODE
from tests.kvtransfer.rig import Rig, until
from tests.kvtransfer.ucx_peer import PREFILL, Post, PrefillEnd
from wire.codec import decode
from wire.errors import WireError
from wire.geometry import WHOLE_BLOCKS, Geometry
from wire.request_messages import Granted

if WHY_NOT := why_unavailable():
    pytest.skip(WHY_NOT, allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Peer:
    """The other process."""

    process: subprocess.Popen[bytes]
    post: Post
    url: str

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop_when_granted(self, name: str) -> None:
        """Stop the decode node when its grant is here, before the first unit leaves for it."""
        hand_over = self.post.handlers[b"granted"]

        def stop_and_hand_over(data: bytes, num_tokens: bytes) -> None:
            message = decode(data).message
            if isinstance(message, Granted) and message.id.request == name:
                self.signal(signal.SIGSTOP)
            hand_over(data, num_tokens)

        self.post.handlers[b"granted"] = stop_and_hand_over


@asynccontextmanager
async def peer(role: str, tmp_path: Path, kib: int, *flags: str) -> AsyncIterator[Peer]:
    """Start the other end; it ends by itself, or by force, and says nothing unless it is killed."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    path = f"ipc://{tmp_path}/{secrets.token_hex(4)}"
    socket.bind(path)
    post = Post(socket)
    ready: list[str] = []
    post.handlers[b"ready"] = lambda url: ready.append(url.decode())
    command = [sys.executable, "-m", "tests.kvtransfer.ucx_peer", role, path, str(kib)]
    process = subprocess.Popen(  # noqa: ASYNC220
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        await until(lambda: ready or process.poll() is not None)
        assert ready, "it did not start"
        yield Peer(process, post, ready[0])
        if process.poll() is None:
            with suppress(WireError):  # killed a moment ago
                post.send(b"end")
            await asyncio.to_thread(process.wait, 20)
    finally:
        process.kill()
        said = process.communicate()[0].decode()
        post.close()
        context.destroy(0)
    assert not any(word in said for word in ("UCX", "Traceback", "Error")), said
    assert process.returncode in (0, -signal.SIGKILL)


async def ask(post: Post, kind: bytes, *frames: bytes, answer: bytes) -> tuple[bytes, ...]:
    heard: list[tuple[bytes, ...]] = []
    post.handlers[answer] = lambda *frames: heard.append(frames)
    post.send(kind, *frames)
    await until(lambda: heard)
    return heard[0]


async def check_delivered(end: PrefillEnd, post: Post, names: list[str], num_tokens: int) -> None:
    """What the other process holds is what was handed over, and nothing touches a block."""
    size = end.pool.layout.block_size
    for name in names:
        for index, target in enumerate(end.grants[name].handles):
            frames = await ask(post, b"look", str(target.block_id).encode(), answer=b"seen")
            end_of = min(size, num_tokens - index * size)
            there = filled(memoryview(frames[0]), end_of, end.pool.layout)
            assert there == end.pool.content(end.source[name][index], end_of)
            assert frames[1] == b"0"


@dataclass
class UcxRig:
    """A rig whose units travel over UCX."""

    geometry: Geometry = WHOLE_BLOCKS

    def __post_init__(self) -> None:
        self.rig = Rig(geometry=self.geometry)
        self.receiver = UcxUnitReceiver(RIG_DECODE, self.rig.receiver, self.rig.received)
        self.sender = UcxUnitSender(PREFILL)
        self.rig.use(self.sender, self.receiver.address)

    async def hand_over(self, num_tokens: int, request: str = "last") -> None:
        """A handoff that must work, whatever came before it."""
        await self.rig.hand_over_well(num_tokens, request)

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


class Hostile:
    """A connection to a decode node that sends what it likes; with the pass of its URL, if told."""

    def __init__(self, url: str) -> None:
        self.driver = DrivenWorker(new_context(settings()), lambda: False, lambda: None)
        there, self.password = parse(url)
        self.endpoint = self.driver.connect(there)
        self.sent: list[tuple[Any, Any]] = []
        self.key = 0

    async def welcomed(self) -> None:
        self.send(HELLO_TAG, pack_hello(PREFILL, RIG_DECODE, self.password, self.driver.address))
        await until(lambda: self.driver.probe(WELCOME_TAG))
        found = self.driver.probe(WELCOME_TAG)
        assert found
        welcome = bytearray(found[1])
        self.driver.receive(array(welcome), WELCOME_TAG)
        begin = MAGIC + self.password
        assert welcome.startswith(begin)
        self.key = int.from_bytes(welcome[len(begin) : len(begin) + 8], "little")
        self.endpoint = self.driver.connect(bytes(welcome[len(begin) + 8 :]))

    def send(self, tag: int, data: bytes) -> None:
        buffer = array(data)
        self.sent.append((buffer, self.driver.send(self.endpoint, buffer, tag)))
        self.driver.wake()

    async def close(self) -> None:
        """Whatever it sent was taken from it: nothing stays with UCX."""
        await until(lambda: all(request.completed for _, request in self.sent))
        self.endpoint.close_blocking()
        self.driver.close()
