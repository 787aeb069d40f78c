"""Two processes and kill -9: the survivor loses nothing, and nothing of the dead one is left."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitSender
from tests.kvtransfer.rig import until
from tests.kvtransfer.shm_peer import (
    BLOCK_BYTES,
    DECODE,
    NUM_BLOCKS,
    PREFILL,
    OneBlock,
    header,
    make_receiver,
    make_sender,
)
from wire.errors import TransferError

ROOT = Path(__file__).parents[2]
SOME_POINTS = [0, 1, 7, 100]  # units before the kill
TRANSPORTS = ["shm", "cuda-ipc"]


@contextmanager
def peer(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The other process, and the first line that it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kvtransfer.shm_peer", *argv],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL


def mappings() -> set[str]:
    """The pools that this process has mapped, its own and others'."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line for line in lines if "memfd:baton-kv" in line}


def assert_nothing_is_left(url: str, before: set[str]) -> None:
    assert mappings() <= before
    assert url.rpartition("/")[2] not in Path("/proc/net/unix").read_text()
    assert not [name for name in os.listdir("/dev/shm") if "baton" in name]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_units", SOME_POINTS)
def test_a_sender_is_killed(num_units: int, transport: str) -> None:
    async def body() -> None:
        before = mappings()
        sink = OneBlock(memoryview(bytearray(BLOCK_BYTES)))
        receiver = make_receiver(sink, transport)
        with peer("send", receiver.address.url) as (process, _):
            await until(lambda: receiver.num_peers and sink.landed >= num_units)
            kill(process)
            await until(lambda: not receiver.num_peers)
        assert not receiver._stats.units_dropped
        await until(lambda: mappings() <= before)  # once nothing reads it any more
        assert sink.landed == 0 or bytes(sink.view) == b"\x05" * BLOCK_BYTES
        receiver.close()
        assert_nothing_is_left(receiver.address.url, before)

    asyncio.run(body())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_units", SOME_POINTS)
def test_a_receiver_is_killed(num_units: int, transport: str) -> None:
    async def body() -> None:
        before = mappings()
        sender, send, pool = make_sender(transport)
        ended: list[int] = []
        with peer("receive", transport) as (process, url):
            for number in range(num_units + 500):
                send(url, number, partial(ended.append, number))
            await until(lambda: len(ended) >= num_units)
            kill(process)
            await until(lambda: len(ended) == num_units + 500)
            await until(lambda: all(lane.lost for lane in sender._lanes.values()))
        assert ended == sorted(ended)
        with pytest.raises(TransferError):
            sender.reaches(url, DECODE)
        with pytest.raises(TransferError, match="cannot connect"):
            send(url, 0, lambda: None)
        sender.close()
        pool.close()
        del send
        gc.collect()
        pool.buffer.close()
        assert_nothing_is_left(url, before)

    asyncio.run(body())


def test_a_stopped_receiver_goes_on_where_it_was() -> None:
    async def body() -> None:
        pool = SharedMemory(NUM_BLOCKS * BLOCK_BYTES)
        sender = ShmUnitSender(PREFILL, pool)
        block = memoryview(pool.buffer)[:BLOCK_BYTES]
        ended: list[int] = []
        with peer("receive", "shm") as (process, url):
            assert sender.reaches(url, DECODE)
            process.send_signal(signal.SIGSTOP)
            for number in range(2000):
                sender.send(url, DECODE, header(number), block, lambda n=number: ended.append(n))  # type: ignore[misc]
            await asyncio.sleep(0.05)
            assert len(ended) < 2000
            process.send_signal(signal.SIGCONT)
            await until(lambda: len(ended) == 2000)
        sender.close()
        pool.close()

    asyncio.run(body())
