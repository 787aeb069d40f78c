"""What this machine gives a process: processor, usable cores, memory, accelerator devices.

Only reads files below a root directory (another one in tests) and loads no other package. A
container may use less than the machine has: affinity, cgroup quotas and limits count.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # x86, x86, Arm
SHOWN_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16"),  # x86
    *("asimd", "sve", "sve2", "i8mm", "bf16"),  # Arm
)
ACCELERATOR_DEVICES = ("dev/nvidiactl", "dev/kfd", "dev/dxg")  # NVIDIA, AMD, Windows' subsystem
ROOT = Path("/")
MAX_DEFAULT_KV_MEMORY = 1 << 30
MIN_DEFAULT_KV_MEMORY = 64 << 20
WORK_BYTES = 256 << 20  # of a node besides weights and KV: activations, libraries, buffers
UNKNOWN_MEMORY = 4 << 30  # assumed available where the system does not tell


@dataclass(frozen=True, slots=True)
class Machine:
    """What a process that starts now may use."""

    cpu_model: str
    cpu_flags: frozenset[str]
    num_cores: int  # usable: at least 1
    memory_bytes: int  # this machine's or this container's; 0 if unknown
    available_bytes: int  # of it, without swapping; 0 if unknown
    accelerator_devices: tuple[str, ...]

    @property
    def has_bf16_units(self) -> bool:
        """Whether the CPU multiplies bf16 itself."""
        return not BF16_FLAGS.isdisjoint(self.cpu_flags)

    @property
    def shown_flags(self) -> list[str]:
        """The instruction sets that matter for a model's speed."""
        return [flag for flag in SHOWN_FLAGS if flag in self.cpu_flags]


def look(root: Path = ROOT) -> Machine:
    """Look at the machine whose `/proc`, `/sys` and `/dev` lie below `root`."""
    cpu = _fields(root / "proc/cpuinfo")
    memory = _fields(root / "proc/meminfo")
    total, available = (_kilobytes(memory.get(name)) for name in ("MemTotal", "MemAvailable"))
    limits = list(_memory_limits(root))
    total = min([total, *(limit for limit, _ in limits)])
    available = min([available, *(max(0, limit - used) for limit, used in limits)])
    return Machine(
        cpu_model=cpu.get("model name") or platform.processor() or platform.machine(),
        cpu_flags=frozenset((cpu.get("flags") or cpu.get("Features") or "").split()),
        num_cores=usable_cores(root),
        memory_bytes=total,
        available_bytes=available,
        accelerator_devices=tuple(
            f"/{dev}" for dev in ACCELERATOR_DEVICES if (root / dev).exists()
        ),
    )


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy: its affinity, or a cgroup's quota if that is less."""
    cores = float(len(os.sched_getaffinity(0)))
    for group in _cgroups(root, "cpu"):
        period = _number(group / "cpu.cfs_period_us")
        quota = _number(group / "cpu.cfs_quota_us")
        limit = _text(group / "cpu.max").split()  # version 2: "max 100000" or "150000 100000"
        if len(limit) == 2 and limit[0] != "max":
            quota, period = int(limit[0]), int(limit[1])
        if quota is not None and period and quota > 0:
            cores = min(cores, quota / period)
    return max(1, int(cores))


def available_memory() -> int:
    """Bytes that can be taken without swapping, as the kernel estimates it."""
    return look().available_bytes or UNKNOWN_MEMORY


def default_kv_memory() -> int:
    """A fifth of what is free, at most 1 GiB: several nodes share a small machine."""
    return min(MAX_DEFAULT_KV_MEMORY, available_memory() // 5)


def kv_memory_of_each(num_nodes: int, weight_bytes: int, available: int) -> int:
    """The pool of each of several nodes that will start together; 0 where they do not fit.

    Half of what is left beside their weights, shared, at most 1 GiB: each node alone would see
    memory as free that the others are about to take.
    """
    left = available - num_nodes * (weight_bytes + WORK_BYTES)
    share = min(MAX_DEFAULT_KV_MEMORY, left // (2 * num_nodes))
    return share if share >= MIN_DEFAULT_KV_MEMORY else 0


def size(num_bytes: int) -> str:
    """`"1.5 GiB"`."""
    amount = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Each cgroup's limit in bytes, and what counts against it and cannot be taken back."""
    for group in _cgroups(root, "memory"):
        for limit_name, usage_name, file_name in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(group / limit_name)
            if limit is not None:
                cached = _counters(group / "memory.stat").get(file_name, 0)
                yield limit, max(0, (_number(group / usage_name) or 0) - cached)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """This process's group and all groups above it: each may set a limit."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":  # version 2
            base = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
        else:
            continue
        group = base / path.lstrip("/")
        yield group
        if group != base:
            yield from (above for above in group.parents if above.is_relative_to(base))


def _fields(path: Path) -> dict[str, str]:
    """`name: value` lines up to the first empty one."""
    lines = _text(path).split("\n\n", 1)[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _counters(path: Path) -> dict[str, int]:
    """Lines of `name number`."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _kilobytes(text: str | None) -> int:
    """Bytes of `"123 kB"`."""
    return int(text.split()[0]) * 1024 if text else 0


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    """The file's text; empty if it does not exist or may not be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
