"""A bare ucxx loop between two processes: the floor of the `ucx` transport.

Tagged sends from a pool like a prefill node's into memory like a decode node's, by receives that
are posted before; the same settings, devices and number of bytes under way as the transport's,
connected before the clock starts. Nothing is asked, checked or awaited but UCX. Both sides sleep in
`epoll` when UCX has nothing to do: spinning is four times slower as soon as the machine has other
work.

Both walk through all of their memory, as a handoff does. A loop over one buffer and a few others
stays in the processor's cache and needs a third less time, which no transport of blocks can.

`python -m benchmarks.ucx_bare BYTES COUNT` is the sending process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.ucx_lane import POSTED_BYTES
from kvtransfer.ucx_worker import array, load, new_context, settings

_DATA, _READY, _BEGIN = 1, 2, 3  # tags


class BareLoop:
    """A UCX worker without asyncio."""

    def __init__(self) -> None:
        self.ucx = load()
        self.worker = self.ucx.UCXWorker(new_context(settings()))
        self.worker.init_blocking_progress_mode()
        self.endpoint: Any = None

    @property
    def address(self) -> str:
        return bytes(self.worker.address.tobytes()).hex()

    def connect(self, address: str) -> None:
        there = self.ucx.UCXAddress.create_from_buffer(bytes.fromhex(address))
        self.endpoint = self.worker.create_endpoint_from_worker_address(there, True)

    def send(self, data: Any, tag: int) -> Any:
        return self.endpoint.tag_send(data, self.ucx.UCXXTag(tag))

    def receive(self, into: Any, tag: int) -> Any:
        return self.worker.tag_recv(into, self.ucx.UCXXTag(tag))

    def until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self.worker.progress_worker_event(10)

    def keep_under_way(self, most: int, count: int, post: Callable[[int], Any]) -> None:
        """Post `count` requests, never more than `most` at a time, and wait for all."""
        requests: deque[Any] = deque()
        for i in range(count):
            if len(requests) == most:
                oldest = requests.popleft()
                self.until(lambda oldest=oldest: oldest.completed)  # type: ignore[misc]
            requests.append(post(i))
        self.until(lambda: all(request.completed for request in requests))

    def tell(self, tag: int) -> None:
        word = array(b"!")
        sent = self.send(word, tag)
        self.until(lambda: bool(sent.completed))

    def hear(self, tag: int) -> None:
        word = array(bytearray(1))
        heard = self.receive(word, tag)
        self.until(lambda: bool(heard.completed))


def under_way(num_bytes: int) -> int:
    """Messages at a time: as many as the transport gives UCX."""
    return max(2, POSTED_BYTES // num_bytes)


class BarePair:
    """Another process sends, this one receives into `blocks`, all of one size."""

    def __init__(self, blocks: Sequence[memoryview]) -> None:
        num_bytes, count = len(blocks[0]), len(blocks)
        self._most = under_way(num_bytes)
        self._loop = BareLoop()
        self._blocks = [array(block) for block in blocks]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ucx_bare", str(num_bytes), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None, "asked for a pipe"
        self._loop.connect(self._process.stdout.readline().strip())
        self._tell_process(self._loop.address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def seconds(self) -> float:
        """From the first byte's arrival until every block is there."""
        loop, blocks = self._loop, self._blocks
        first = deque(loop.receive(block, _DATA) for block in blocks[: self._most])
        self._tell_process("go")
        loop.tell(_READY)
        loop.hear(_BEGIN)
        start = time.perf_counter()
        loop.keep_under_way(
            self._most,
            len(blocks),
            lambda i: first.popleft() if first else loop.receive(blocks[i], _DATA),
        )
        return time.perf_counter() - start

    def _tell_process(self, line: str) -> None:
        assert self._process.stdin is not None, "asked for a pipe"
        print(line, file=self._process.stdin, flush=True)


def pool(num_bytes: int, count: int) -> list[memoryview]:
    """Blocks of a pool as a prefill node has it, all of them written."""
    memory = SharedMemory(num_bytes * count)
    whole = memoryview(memory.buffer)
    blocks = [whole[i * num_bytes : (i + 1) * num_bytes] for i in range(count)]
    for block in blocks:
        block[:] = bytes(num_bytes)
    return blocks


def send(num_bytes: int, count: int) -> None:
    """The other process."""
    blocks = [array(block) for block in pool(num_bytes, count)]
    loop = BareLoop()
    print(loop.address, flush=True)
    loop.connect(sys.stdin.readline().strip())
    for _ in sys.stdin:  # "go"
        loop.hear(_READY)
        loop.tell(_BEGIN)
        loop.keep_under_way(under_way(num_bytes), count, lambda i: loop.send(blocks[i], _DATA))


if __name__ == "__main__":
    send(int(sys.argv[1]), int(sys.argv[2]))
