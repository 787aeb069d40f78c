"""How long work takes on a device, by the device's own clock where it has one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Rate:
    """How much was done in how many seconds: bytes or floating point operations."""

    amount: float
    seconds: float

    @property
    def per_second(self) -> float:
        return self.amount / self.seconds

    def __add__(self, other: Rate) -> Rate:
        """One after the other."""
        return Rate(self.amount + other.amount, self.seconds + other.seconds)


@dataclass(frozen=True, slots=True)
class Clock:
    """Times calls on one device.

    A burst of calls is timed at once: the device is faster than the host that launches the first,
    and would be seen waiting for it.
    """

    device: torch.device
    repeats: int = 10
    burst: int = 10

    def seconds(self, call: Callable[[], object]) -> float:
        """Of one call: the median over bursts, after calls that warm up."""
        for _ in range(WARM_UPS):
            call()
        timed = self._on_gpu if self.device.type == "cuda" else self._here
        return statistics.median(timed(call) for _ in range(self.repeats)) / self.burst

    def _on_gpu(self, call: Callable[[], object]) -> float:
        make: Callable[..., Any] = torch.cuda.Event
        start, end = make(enable_timing=True), make(enable_timing=True)
        start.record()
        for _ in range(self.burst):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _here(self, call: Callable[[], object]) -> float:
        return sum(seconds(call) for _ in range(self.burst))


def seconds(call: Callable[[], object]) -> float:
    """Of one call, on the host's clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
