"""What the fleet's key costs: PUSH to PULL over TCP, with CURVE and without, in pairs.

Both ends are in one process; libzmq encrypts and decrypts on each context's own I/O thread. Ratios
are medians of pairs that ran one after the other, so that a busy machine changes both sides alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import threading
import time

import zmq

from wire.curve import FleetContext
from wire.fleet_key import FleetKey, make_key
from wire.sockets import bind, connect


def main() -> None:
    """Measure, print a line per size and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes-kb", type=int, nargs="+", default=[16, 96, 384, 1024])
    parser.add_argument("--mb", type=int, default=256, help="how much to send each time")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    key = make_key()
    ratios = {}
    for size_kb in args.sizes_kb:
        pairs = [
            (asyncio.run(rate(key, size_kb, args.mb)), asyncio.run(rate(None, size_kb, args.mb)))
            for _ in range(args.pairs)
        ]
        ratios[size_kb] = statistics.median(curve / plain for curve, plain in pairs)
        curve, plain = (statistics.median(side) for side in zip(*pairs, strict=True))
        print(f"{size_kb} KB: {curve:.2f} GB/s with a key, {plain:.2f} without")
    print(json.dumps({"curve_vs_plain": {k: round(v, 3) for k, v in ratios.items()}}))


async def rate(key: FleetKey | None, size_kb: int, num_mb: int) -> float:
    """GB/s of messages of this size. Within a loop, which the door of a keyed context needs."""
    here, there = FleetContext(key), FleetContext(key)
    pull, push = here.socket(zmq.PULL), there.socket(zmq.PUSH)
    bind(pull, "tcp://127.0.0.1:*")
    connect(push, pull.last_endpoint.decode().rstrip("\0"))
    payload = bytearray(size_kb << 10)
    count = (num_mb << 10) // size_kb
    sender = threading.Thread(
        target=lambda: [push.send(payload, copy=False) for _ in range(count + 1)]
    )
    sender.start()
    try:
        return await asyncio.to_thread(_receive, pull, size_kb << 10, count)
    finally:
        sender.join()
        here.destroy(0)
        there.destroy(0)


def _receive(pull: zmq.Socket[bytes], size: int, count: int) -> float:
    block = bytearray(size)
    pull.recv_into(block)  # the connection stands
    begin = time.perf_counter()
    for _ in range(count):
        pull.recv_into(block)
    return size * count / (time.perf_counter() - begin) / 1e9


if __name__ == "__main__":
    main()
