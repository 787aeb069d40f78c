"""What a node may take of the machine it stands on."""

from __future__ import annotations

import os
from pathlib import Path

MAX_DEFAULT_KV_MEMORY = 1 << 30


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def available_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 4 << 30


def default_kv_memory() -> int:
    """A fifth of what is free, at most 1 GiB: several nodes share a small machine."""
    return min(MAX_DEFAULT_KV_MEMORY, available_memory() // 5)
