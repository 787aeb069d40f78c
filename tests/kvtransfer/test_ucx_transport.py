"""The handoff over UCX between two processes, and what dead, stopped and hostile peers do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvtransfer.lease import LeaseState
from kvtransfer.ucx_worker import ENVIRONMENT, why_unavailable
from kvtransfer.units import gather
from tests.kvtransfer.rig import until
from wire.errors import TransferError
from wire.messages import UnitHeader
from wire.types import AttemptId, BlockHandle

os.environ.update(ENVIRONMENT)  # before UCX is loaded
WHY_NOT = why_unavailable()
if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

from kvtransfer.ucx_transport import (  # noqa: E402
    UcxUnitSender,
)
from tests.kvtransfer.ucx_peer import (  # noqa: E402
    DECODE,
    PREFILL,
    DecodeEnd,
    Post,
    PrefillEnd,
)

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "ucx://127.0.0.1:1"


def run(body: Coroutine[Any, Any, None]) -> None:
    asyncio.run(body)


@dataclass
class Peer:
    """The other process."""

    process: subprocess.Popen[bytes]
    post: Post
    url: str

    def signal(self, number: int) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def peer(
    role: str, tmp_path: Path, kib: int, *flags: str, port: int = 0
) -> AsyncIterator[Peer]:
    """Start the other end; it ends by itself, or by force, and says nothing unless it is killed."""
    context: zmq.Context[Any] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    path = f"ipc://{tmp_path}/{len(list(tmp_path.iterdir()))}"
    socket.bind(path)
    post = Post(socket)
    ready: list[str] = []
    post.handlers[b"ready"] = lambda url: ready.append(url.decode())
    command = [sys.executable, "-m", "tests.kvtransfer.ucx_peer", role, path, str(kib), str(port)]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        await until(lambda: ready or process.poll() is not None)
        assert ready, process.communicate()[0].decode()
        yield Peer(process, post, ready[0])
        if process.poll() is None:
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
            there = gather(memoryview(frames[0]), end_of, end.pool.layout)
            assert there == end.pool.content(end.source[name][index], end_of)
            assert frames[1] == b"0"


# ---------------------------------------------------------------- blocks arrive as they are


@pytest.mark.parametrize("kib", [1, 7, 8, 9, 64, 1024, 4096])
def test_blocks_arrive_bit_identical(tmp_path: Path, kib: int) -> None:
    """Full ones and a partial one, on both sides of every threshold of UCX."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            names = [f"r{i}" for i in range(2)]
            for name in names:
                other.post.send(b"reserve", name.encode(), b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, other.post, names, 14)
            end.close()

    run(body())


@pytest.mark.parametrize("flag", ["", "torch"])
def test_two_hundred_units_back_to_back(tmp_path: Path, flag: str) -> None:
    async def body() -> None:
        async with peer("decode", tmp_path, 64, flag) as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"long", b"800")
            await until(lambda: end.ended and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 1}
            assert end.stats.bytes_sent == 200 * (64 << 10)
            await check_delivered(end, other.post, ["long"], 800)
            end.close()

    run(body())


# ---------------------------------------------------------------- a decode node that goes


def granted(end: PrefillEnd, name: str) -> Callable[[], object]:
    return lambda: name in end.source


@pytest.mark.parametrize("kib", [4, 1024])
def test_a_killed_decode_node_ends_every_send(
    tmp_path: Path, kib: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stopped first, so that the sends are under way when it dies."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            other.post.send(b"reserve", b"before", b"14")
            await until(lambda: end.ended)
            other.post.send(b"reserve", b"during", b"100")
            await until(granted(end, "during"))
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            other.signal(signal.SIGKILL)
            await until(lambda: end.units._lanes[other.url].lost and not end.pool.touched)
            end.close()

    run(body())
    assert kib == 4 or "is gone" in caplog.text  # small units are in the kernel's hands by then


def test_what_was_lost_a_moment_ago_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    async def body() -> None:
        nonlocal now
        sender = UcxUnitSender(PREFILL, clock=lambda: now)
        done: list[int] = []

        def send() -> None:
            sender.send(NOBODY, DECODE, header(), memoryview(b"12345678"), lambda: done.append(1))

        send()
        send()
        await until(lambda: len(done) == 2)
        with pytest.raises(TransferError, match="lost a moment ago") as caught:
            send()
        assert caught.value.cause == "transport"
        now = 1.0
        send()
        await until(lambda: len(done) == 3)
        sender.close()
        assert len(done) == 3

    run(body())
    assert "is gone; dropped 2 units" in caplog.text


def test_a_decode_node_that_was_killed_between_handoffs_costs_one_lane(tmp_path: Path) -> None:
    """Its successor on the same port is connected to at once."""

    async def body() -> None:
        async with peer("decode", tmp_path, 64) as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: end.units._lanes[other.url].lost)
        port = int(other.url.rpartition(":")[2])
        async with peer("decode", tmp_path, 64, port=port) as successor:
            assert successor.url == other.url
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            successor.post.send(b"reserve", b"second", b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, successor.post, ["second"], 14)
            end.close()

    run(body())


def test_a_stopped_decode_node_keeps_the_sends_until_the_lane_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with peer("decode", tmp_path, 1024) as other:
            end = PrefillEnd(other.post, 1024, stall_s=0.5)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.post.send(b"reserve", b"second", b"100")
            await until(granted(end, "second"))
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)
            assert end.pool.touched
            await until(lambda: not end.pool.touched)
            other.signal(signal.SIGCONT)
            await asyncio.sleep(1.1)  # no handoff is tried on a lane lost a moment ago
            other.post.send(b"reserve", b"third", b"14")
            await until(lambda: "third" in end.ended and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, other.post, ["third"], 14)
            end.close()

    run(body())
    assert "takes no units" in caplog.text


def test_closing_with_sends_in_flight_gives_every_block_back_once(tmp_path: Path) -> None:
    """`Pool.end_io` fails on a second time."""

    async def body() -> None:
        async with peer("decode", tmp_path, 1024) as other:
            for number in range(3):
                end = PrefillEnd(other.post, 1024)
                other.post.send(b"reserve", f"r{number}".encode(), b"100")
                await until(lambda end=end: end.source)  # type: ignore[misc]
                await asyncio.sleep(0.005 * number)
                end.close()
                end.close()
                assert not end.pool.touched

    run(body())


# ---------------------------------------------------------------- a prefill node that goes


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01, 0.03])
@pytest.mark.parametrize("kib", [4, 1024])
def test_a_killed_prefill_node_touches_no_block_any_more(
    tmp_path: Path, kib: int, after_s: float
) -> None:
    """Killed before, between or within its units; the next one finds everything in order."""

    async def body() -> None:
        async with peer("prefill", tmp_path, kib) as other:
            end = DecodeEnd(other.post, kib)
            reserve(end, "first", 14)
            await until(lambda: end.leases)
            reserve(end, "second", 400)
            await asyncio.sleep(after_s)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: not end.units._lanes)
            await until(lambda: not end.pool.touched)
            end.receiver.end_sender(PREFILL)
        assert len(end.leases) == 2
        async with peer("prefill", tmp_path, kib) as successor:
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            reserve(end, "third", 14)
            await until(lambda: len(end.leases) == 3)
            assert end.leases[2].state is LeaseState.COMMITTED
            end.close()
            assert not end.pool.touched

    run(body())


def test_a_stopped_prefill_node_loses_its_lane(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it began cannot be revoked; closing the endpoint ends it, and nothing comes later."""

    async def body() -> None:
        async with peer("prefill", tmp_path, 4096) as other:
            end = DecodeEnd(other.post, 4096, stall_s=0.5)
            reserve(end, "first", 100)
            await until(lambda: end.pool.touched)
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            assert end.pool.touched
            end.receiver.abort(AttemptId("first", 1))
            assert end.pool.quarantined
            await until(lambda: not end.pool.touched)
            assert not end.pool.quarantined
            for block in end.pool.blocks:
                block[:] = bytes(len(block))
            other.signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert not any(any(block) for block in end.pool.blocks)
            end.close()
            other.signal(signal.SIGKILL)

    run(body())
    assert "stopped within" in caplog.text


def reserve(end: DecodeEnd, name: str, num_tokens: int) -> None:
    end._reserve(name.encode(), str(num_tokens).encode())


def header(**other: Any) -> UnitHeader:
    values: dict[str, Any] = {
        "lease": 1,
        "capability": b"c" * 16,
        "unit": 0,
        "handle": BlockHandle(22, 0, 1),
        "token_start": 0,
        "token_end": 4,
        "num_bytes": 8,
    }
    return UnitHeader(**values | other)
