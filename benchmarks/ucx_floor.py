"""What UCX itself does here: the rate of a bare ucxx loop between two processes.

The floor for the `ucx` transport. Nothing but tagged sends of one buffer and receives into another,
a few MB under way, same settings as the transport (the rendezvous that lets the peer write into our
memory is forbidden here too). Both sides sleep in `epoll` when UCX has nothing to do: spinning is
four times slower as soon as the machine has other work.

`python -m benchmarks.ucx_floor` measures the transport beside it, in turns.
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
from typing import IO, Any

from baton.config import UCX_ENVIRONMENT
from kvtransfer.transport import TransferStats
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import array, load, new_context, settings, why_unavailable
from wire.messages import UnitHeader
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
        pairs = [(transport_rate(size, count), bare_rate(size, count)) for _ in range(args.turns)]
        ours, bare = (statistics.median(rates) for rates in zip(*pairs, strict=True))
        ratios[size] = statistics.median(a / b for a, b in pairs)
        print(f"{size >> 10:5d} KiB: transport {ours / 1e9:.2f} GB/s, bare {bare / 1e9:.2f} GB/s")
    print(json.dumps({"ucx_vs_bare": {size: round(ratio, 3) for size, ratio in ratios.items()}}))


def bare_rate(num_bytes: int, count: int) -> float:
    """Bytes per second of a bare loop of messages of this size."""
    with other_process("bare", num_bytes, count) as (port, _):
        loop = BareLoop()
        endpoint = loop.worker.create_endpoint_from_hostname("127.0.0.1", int(port), True)
        data, tag = array(bytes(num_bytes)), loop.ucx.UCXXTag(1)
        answer = bytearray(1)
        over = loop.worker.tag_recv(array(answer), loop.ucx.UCXXTag(2))
        start = time.perf_counter()
        loop.keep_under_way(under_way(num_bytes), count, lambda _: endpoint.tag_send(data, tag))
        loop.until(lambda: over.completed)
        return num_bytes * count / (time.perf_counter() - start)


def under_way(num_bytes: int) -> int:
    """Messages at a time: as many as the transport gives UCX."""
    return max(2, min(64, (4 << 20) // num_bytes))


def receive_bare(num_bytes: int, count: int) -> None:
    """The other process of `bare_rate`."""
    loop = BareLoop()
    endpoints: list[Any] = []
    listener: Any = loop.ucx.UCXListener.create(
        loop.worker,
        0,
        lambda request: endpoints.append(listener.create_endpoint_from_conn_request(request, True)),
    )
    print(listener.port, flush=True)
    blocks = [array(bytearray(num_bytes)) for _ in range(under_way(num_bytes))]
    tag = loop.ucx.UCXXTag(1)
    loop.keep_under_way(
        len(blocks), count, lambda i: loop.worker.tag_recv(blocks[i % len(blocks)], tag)
    )
    answer = array(b"!")
    sent = endpoints[0].tag_send(answer, loop.ucx.UCXXTag(2))
    loop.until(lambda: sent.completed)
    sys.stdin.readline()


class BareLoop:
    """A UCX worker without asyncio."""

    def __init__(self) -> None:
        self.ucx = load()
        self.worker = self.ucx.UCXWorker(new_context(settings()))
        self.worker.init_blocking_progress_mode()

    def until(self, holds: Any) -> None:
        while not holds():
            self.worker.progress_worker_event(10)

    def keep_under_way(self, most: int, count: int, post: Any) -> None:
        """Post `count` requests, never more than `most` at a time."""
        requests: list[Any] = []
        for i in range(count):
            if len(requests) == most:
                oldest = requests.pop(0)
                self.until(lambda oldest=oldest: oldest.completed)
            requests.append(post(i))
        self.until(lambda: all(request.completed for request in requests))


# -------------------------------------------------------------------- the transport beside it


def transport_rate(num_bytes: int, count: int) -> float:
    """Bytes per second of units of this size through the transport, its digests left out."""
    with other_process("transport", num_bytes, count) as (url, tell):
        return asyncio.run(_send_units(url, tell, num_bytes, count))


async def _send_units(url: str, tell: IO[str], num_bytes: int, count: int) -> float:
    sender = UcxUnitSender(PREFILL)
    back = UcxUnitReceiver(PREFILL, over := Sink(1, 1), TransferStats())
    data = memoryview(bytes(num_bytes))
    print(back.address.url, file=tell, flush=True)
    sender.send(url, DECODE, HEADER, data, nothing)
    await asyncio.wait_for(over.full.wait(), 60)  # the lanes are open in both directions
    over.full.clear()
    over.missing = 1
    start = time.perf_counter()
    for _ in range(count):
        sender.send(url, DECODE, HEADER, data, nothing)
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


class Sink:
    """Takes every unit into one of a few blocks, in turn."""

    def __init__(self, num_bytes: int, missing: int) -> None:
        self.missing = missing
        self.first = asyncio.Event()
        self.full = asyncio.Event()
        self._blocks = [memoryview(bytearray(num_bytes)) for _ in range(8)]
        self._next = 0

    def begin(self, sender: NodeId, header: UnitHeader) -> Block:
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
def other_process(what: str, num_bytes: int, count: int) -> Iterator[tuple[str, IO[str]]]:
    """Start the receiving process; yields the first line that it prints, and its stdin."""
    command = [sys.executable, "-m", "benchmarks.ucx_floor", what, str(num_bytes), str(count)]
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
    if sys.argv[1:2] == ["bare"]:
        receive_bare(int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["transport"]:
        asyncio.run(receive_units(int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
