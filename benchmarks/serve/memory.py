"""How much memory a process has, as the kernel accounts for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

MB = 1e6


def resident_bytes(pid: int) -> int:
    """Resident set size, shared pages included."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB", text, re.MULTILINE)
    assert match, "no VmRSS: a kernel thread or a zombie"
    return int(match[1]) * 1024


@dataclass(frozen=True, slots=True)
class Memory:
    """What the mappings of a process hold, in bytes."""

    private: int  # pages that no other process shares, outside of weight files
    weight_files: int  # resident pages of mapped safetensors files, shared or not


def memory_of(pid: int) -> Memory:
    """Sum over all mappings of a process."""
    return parse_smaps(Path(f"/proc/{pid}/smaps").read_text())


def parse_smaps(text: str) -> Memory:
    """Read the text of `/proc/PID/smaps`: mappings, each after a line with its address range."""
    private = weight_files = 0
    in_weights = False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            in_weights = line.endswith(".safetensors")
        elif match := re.match(r"(Rss|Private_Clean|Private_Dirty):\s+(\d+) kB", line):
            size = int(match[2]) * 1024
            if match[1] == "Rss":
                weight_files += size if in_weights else 0
            else:
                private += 0 if in_weights else size
    return Memory(private, weight_files)


def children(pid: int) -> dict[int, str]:
    """Process id → command line of everything that `pid` has started, at any depth."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)], commands[int(folder.name)] = int(fields[1]), command.strip()
    return {child: commands[child] for child in parents if pid in _ancestors(child, parents)}


def _ancestors(pid: int, parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    while (pid := parents.get(pid, 0)) > 0:
        found.add(pid)
    return found
