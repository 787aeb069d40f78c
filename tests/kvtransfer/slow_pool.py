"""A pool whose reads and writes take their time, as a device's do: tests say when they are over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvtransfer.block_memory import ArrivedUnit, HeldUnit, InPlace, TellRead, TellWritten
from kvtransfer.relay import place_of
from tests.kvtransfer.pool import Pool
from wire.layout import KVLayout


class SlowPool(Pool):
    """Reads and writes happen, in order, when the test calls `go_on`."""

    in_place = False

    def __init__(self, layout: KVLayout, num_blocks: int = 64, epoch: int = 1) -> None:
        super().__init__(layout, num_blocks, epoch)
        self.waiting: deque[Callable[[], None]] = deque()

    def go_on(self, count: int = 1_000_000) -> None:
        while self.waiting and count:
            self.waiting.popleft()()
            count -= 1

    def read(
        self,
        units: Sequence[HeldUnit],
        dtype: str,
        tell: TellRead,
        *,
        seed: int | None = None,
        payload: bool = True,
    ) -> None:
        def told(number: int, data: memoryview | None, content: bytes) -> None:
            copy = memoryview(bytearray(data or b""))
            tell(number, copy if payload else None, content)

        self.waiting.append(partial(InPlace.read, self, list(units), dtype, told, seed=seed))

    def room(self, block_id: int, part: slice | None, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, *, seed: int
    ) -> None:
        self.waiting.append(partial(self._write, list(units), dtype, tell, seed))

    def _write(
        self, units: Sequence[ArrivedUnit], dtype: str, tell: TellWritten, seed: int
    ) -> None:
        for unit, block_id, data, _ in units:
            assert isinstance(data, memoryview)
            place = place_of(unit, self.layout, dtype)
            if place is not None:
                self.block_bytes(block_id)[place] = data
        InPlace.write(self, units, dtype, tell, seed=seed)
