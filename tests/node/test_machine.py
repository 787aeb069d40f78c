"""Reading a machine's files, on made-up machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.machine import WORK_BYTES, default_kv_memory, kv_memory_of_each, look, usable_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


CPU = "processor : 0\nmodel name\t: Some CPU\nflags\t: fpu avx2 fma avx512_bf16\n\nprocessor : 1\n"
MEMORY = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\n"


def test_plain_machine(tmp_path: Path) -> None:
    found = look(machine(tmp_path, {"proc/cpuinfo": CPU, "proc/meminfo": MEMORY}))
    assert found.cpu_model == "Some CPU"
    assert found.shown_flags == ["avx2", "fma", "avx512_bf16"]
    assert found.has_bf16_units
    assert found.num_cores == 8
    assert (found.memory_bytes, found.available_bytes) == (1000 * 1024, 400 * 1024)
    assert found.accelerator_devices == ()


def test_arm_and_accelerator(tmp_path: Path) -> None:
    cpu = "processor : 0\nFeatures : fp asimd sve\n"
    found = look(machine(tmp_path, {"proc/cpuinfo": cpu, "dev/nvidiactl": ""}))
    assert found.shown_flags == ["asimd", "sve"]
    assert not found.has_bf16_units
    assert found.accelerator_devices == ("/dev/nvidiactl",)


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    found = look(tmp_path)
    assert (found.num_cores, found.memory_bytes, found.available_bytes) == (8, 0, 0)


def test_cgroup_2_limits_of_a_parent_count(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMORY,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/cpu.max": "250000 100000\n",
        "sys/fs/cgroup/a/memory.max": "102400\n",
        "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    found = look(machine(tmp_path, files))
    assert found.num_cores == 2
    assert (found.memory_bytes, found.available_bytes) == (102400, 102400)


def test_cgroup_1_limits(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMORY,
        "proc/self/cgroup": "4:memory:/x\n1:cpu,cpuacct:/\n0::/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = look(machine(tmp_path, files))
    assert found.num_cores == 1
    assert found.memory_bytes == 1000 * 1024


@pytest.mark.parametrize(
    ("group", "limit", "usage", "cache"),
    [
        ("0::/a", "a/memory.max", "a/memory.current", "inactive_file"),
        (
            "4:memory:/a",
            "memory/a/memory.limit_in_bytes",
            "memory/a/memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ],
)
def test_what_a_cgroup_has_used_is_not_available(
    tmp_path: Path, group: str, limit: str, usage: str, cache: str
) -> None:
    files = {
        "proc/meminfo": MEMORY,
        "proc/self/cgroup": f"{group}\n",
        f"sys/fs/cgroup/{limit}": "204800\n",
        f"sys/fs/cgroup/{usage}": "102400\n",
        f"sys/fs/cgroup/{Path(limit).parent}/memory.stat": f"anon 5\n{cache} 2400\n",
    }
    found = look(machine(tmp_path, files))
    assert (found.memory_bytes, found.available_bytes) == (204800, 104800)


def test_no_quota_is_no_limit(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "1:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert usable_cores(machine(tmp_path, files)) == 8


def test_default_kv_memory_is_a_share_of_what_is_free() -> None:
    assert 0 < default_kv_memory() <= 1 << 30


def test_nodes_that_start_together_share_what_their_weights_leave() -> None:
    gib = 1 << 30
    assert kv_memory_of_each(2, gib, 100 * gib) == gib, "at most 1 GiB each"
    available = 4 * (gib + WORK_BYTES) + 2 * gib
    assert kv_memory_of_each(4, gib, available) == gib // 4, "half stays free"
    assert kv_memory_of_each(4, gib, available - 2 * gib) == 0
    assert kv_memory_of_each(40, gib, gib) == 0
