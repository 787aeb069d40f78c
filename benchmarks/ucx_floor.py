"""The `ucx` transport beside a bare ucxx loop, in turns: `python -m benchmarks.ucx_floor`.

Units of one size go through the product's lanes, headers and asking the sink included, leases and
digests left out (they are in bench_transfer). The floor is in `ucx_bare`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from baton.config import UCX_ENVIRONMENT
from benchmarks.ucx_bare import BarePair, pool
from kvtransfer.transport import TransferStats
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import why_unavailable
from wire.handoff_messages import UnitHeader
from wire.types import BlockHandle, NodeId

SIZES = (16 << 10, 96 << 10, 384 << 10, 1 << 20, 4 << 20)
PREFILL, DECODE = NodeId("prefill", 1), NodeId("decode", 2)
HEADER = UnitHeader(1, b"c" * 16, 0, BlockHandle(1, 1, 1), 0, 16, 1)


def main() -> None:
    """Measure, print a line per size and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=128, help="per size and turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    os.environ.update(UCX_ENVIRONMENT)
    if reason := why_unavailable():
        sys.exit(reason)
    ratios = {}
    for size in SIZES:
        count = max(8, min(3000, (args.megabytes << 20) // size))
        with BarePair(blocks_of(size, count)) as bare_pair:
            bare_pair.seconds()  # connects, and warms up
            pairs = [
                (transport_rate(size, count), size * count / bare_pair.seconds())
                for _ in range(args.turns)
            ]
        ours, bare = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        ratios[size] = statistics.median(a / b for a, b in pairs)
        print(f"{size >> 10:5d} KiB: transport {ours / 1e9:.2f} GB/s, bare {bare / 1e9:.2f} GB/s")
    print(json.dumps({"ucx_vs_bare": {size: round(ratio, 3) for size, ratio in ratios.items()}}))


def transport_rate(num_bytes: int, count: int) -> float:
    """Bytes per second of units of this size through the transport, its digests left out."""
    with other_process(num_bytes, count) as (url, tell):
        return asyncio.run(_send_units(url, tell, num_bytes, count))


async def _send_units(url: str, tell: IO[str], num_bytes: int, count: int) -> float:
    sender = UcxUnitSender(PREFILL)
    back = UcxUnitReceiver(PREFILL, over := Sink(1, 1), TransferStats())
    blocks = pool(num_bytes, count)
    print(back.address.url, file=tell, flush=True)
    sender.send(url, DECODE, HEADER, blocks[0], nothing)
    await asyncio.wait_for(over.full.wait(), 60)  # the lanes are open in both directions
    over.full.clear()
    over.missing = 1
    start = time.perf_counter()
    for block in blocks:
        sender.send(url, DECODE, HEADER, block, nothing)
    await asyncio.wait_for(over.full.wait(), 60)
    rate = num_bytes * count / (time.perf_counter() - start)
    sender.close()
    back.close()
    return rate


async def receive_units(num_bytes: int, count: int) -> None:
    """The other process of `transport_rate`."""
    sink = Sink(num_bytes, count + 1)
    receiver = UcxUnitReceiver(DECODE, sink, TransferStats())
    sender = UcxUnitSender(DECODE)
    print(receiver.address.url, flush=True)
    answer = (await asyncio.to_thread(sys.stdin.readline)).strip()
    await sink.first.wait()
    sender.send(answer, PREFILL, HEADER, memoryview(b"!"), nothing)
    await asyncio.wait_for(sink.full.wait(), 60)
    sender.send(answer, PREFILL, HEADER, memoryview(b"!"), nothing)
    await asyncio.to_thread(sys.stdin.readline)
    sender.close()
    receiver.close()


def nothing() -> None:
    """What is to be done when a send is over."""


def blocks_of(num_bytes: int, count: int) -> list[memoryview]:
    """Memory that was written before."""
    return [memoryview(bytearray(b"!" * num_bytes)) for _ in range(count)]


class Sink:
    """Takes every unit into a block of its own."""

    def __init__(self, num_bytes: int, missing: int) -> None:
        self.missing = missing
        self.first = asyncio.Event()
        self.full = asyncio.Event()
        self._blocks = blocks_of(num_bytes, missing)
        self._next = 0

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> Block:
        self._next = (self._next + 1) % len(self._blocks)
        return Block(self, self._blocks[self._next])

    def landed(self) -> None:
        self.first.set()
        self.missing -= 1
        if not self.missing:
            self.full.set()


class Block:
    """See Landing."""

    def __init__(self, sink: Sink, view: memoryview) -> None:
        self.view = view
        self._sink = sink

    def fill(self, data: memoryview) -> None:
        self.view[:] = data

    def end(self, num_bytes: int) -> None:
        assert num_bytes == len(self.view), "the unit came whole"
        self._sink.landed()


@contextmanager
def other_process(num_bytes: int, count: int) -> Iterator[tuple[str, IO[str]]]:
    """Start the receiving process; yields the first line that it prints, and its stdin."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.ucx_floor",
        "transport",
        str(num_bytes),
        str(count),
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None, "asked for a pipe"
        assert process.stdin is not None, "asked for a pipe"
        yield process.stdout.readline().strip(), process.stdin
        process.communicate("\n", timeout=10)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["transport"]:
        asyncio.run(receive_units(int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
