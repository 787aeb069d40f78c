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
class PrivateMemory:
    """Pages that no other process shares."""

    other: int  # heap, code, everything else
    weight_files: int  # bytes of mapped safetensors files

    @property
    def total(self) -> int:
        return self.other + self.weight_files


def private_memory(pid: int) -> PrivateMemory:
    """Sum over all mappings of a process."""
    return parse_smaps(Path(f"/proc/{pid}/smaps").read_text())


def parse_smaps(text: str) -> PrivateMemory:
    """Private pages in the text of `/proc/PID/smaps`: mappings, each after its address range."""
    weights = other = 0
    in_weights = False
    for line in text.splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            in_weights = line.endswith(".safetensors")
        elif match := re.match(r"Private_(?:Clean|Dirty):\s+(\d+) kB", line):
            size = int(match[1]) * 1024
            weights += size if in_weights else 0
            other += 0 if in_weights else size
    return PrivateMemory(other, weights)


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
