"""Compiles Triton kernels for GPUs on a machine that has none: what the interpreter forgives, the
compiler does not, and what a processor does not hold would fail at the first launch.

    python -m tests.kernels.ahead_of_time           a sample, for an H100: what `make test` does
    python -m tests.kernels.ahead_of_time --every   all that nodes launch, for A100 and H100

Outside of the interpreter. A line per kernel: threads' registers, what of them had to go to memory,
and shared memory.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

FEW_BYTES = 128  # of a thread, in memory: the cache has them
THREADS = 2  # most of a compilation is outside of Python's lock


@dataclass(frozen=True, slots=True)
class Arch:
    """What a kernel must fit into."""

    capability: int
    shared_memory: int  # bytes that a block of threads may have
    num_processors: int


ARCHS = {80: Arch(80, 163 << 10, 108), 90: Arch(90, 227 << 10, 132)}


class NoDevice:
    """Stands in for Triton's driver, as far as compiling asks it."""

    def __init__(self, arch: Arch) -> None:
        self._arch = arch
        properties = {"max_shared_mem": arch.shared_memory}
        self.utils = SimpleNamespace(get_device_properties=lambda _: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch.capability, 32)

    def get_current_device(self) -> int:
        return self._arch.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiling(arch: Arch, made: list[tuple[str, Any]]) -> Iterator[None]:
    """Launches compile their kernel and do nothing more; `made` gets names and results."""
    assert not triton.knobs.runtime.interpret
    launch = triton.JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(function, *args, grid=grid, warmup=True, **options)
        made.append((function.fn.__name__, compiled))

    triton.runtime.driver.set_active(NoDevice(arch))  # which stays: there may be no other
    triton.JITFunction.run = compile_only
    processors = mock.patch(
        "kernels.attention_tiling.num_processors", return_value=arch.num_processors
    )
    try:
        with processors, ThreadPoolExecutor(THREADS) as pool, triton.AsyncCompileMode(pool):
            yield
    finally:
        triton.JITFunction.run = launch


@dataclass(frozen=True, slots=True)
class Made:
    """What a kernel takes."""

    name: str
    choices: str  # by which the kernel differs from others of its name
    registers: int
    spilled: int  # bytes of each thread that lie in memory
    shared: int

    @classmethod
    def of(cls, name: str, compiled: Any) -> Made:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", told)
        assert found, told
        return cls(
            name, choices_of(compiled), int(found[1]), int(found[2]), compiled.metadata.shared
        )


def choices_of(compiled: Any) -> str:
    """`bf16 DIM=128 KEYS=64 … warps=4`: the type of its first argument, and its constants."""
    source = compiled.src
    names = source.fn.arg_names
    constants = {names[place]: value for (place,), value in source.constants.items()}
    told = [f"{name}={value:d}" for name, value in constants.items() if name.isupper()]
    dtype = next(iter(source.signature.values())).removeprefix("*")
    return " ".join([dtype, *told, f"warps={compiled.metadata.num_warps}"])


def compile_all(arch: Arch, cases: Sequence[Callable[[], object]]) -> list[Made]:
    """Each kernel that the cases launch, once."""
    made: list[tuple[str, Any]] = []
    with compiling(arch, made):
        for case in cases:
            case()
    kernels = {compiled.hash: (name, compiled) for name, compiled in made}
    return [Made.of(name, compiled) for name, compiled in kernels.values()]


def count_steady(arch: Arch) -> Iterator[str]:
    """Kernels of which steps that differ in nothing but their sizes want more than one."""
    from tests.kernels.kernel_cases import STEADY

    for name, cases in STEADY.items():
        made: list[tuple[str, Any]] = []
        with compiling(arch, made):
            for case in cases:
                case()
        kinds = {compiled.hash for found, compiled in made if found == name}
        most = 2 if name == "_copy" else 1  # there and back
        if len(kinds) != most:
            yield f"{name}: {len(kinds)} kernels for steps that differ in size alone"


def check(arch: Arch, made: Made) -> str:
    """What is wrong with a kernel; empty if nothing is.

    Products in fp32 use no tensor cores, so that nobody serves with many heads to a group in them.
    """
    if made.shared > arch.shared_memory:
        return f"more than the {arch.shared_memory} bytes of shared memory"
    in_16_bits = not made.choices.startswith("fp32")
    return "spills" if in_16_bits and made.spilled > FEW_BYTES else ""


def chosen(capability: int | None, *, every: bool) -> list[Arch]:
    if capability is not None:
        return [ARCHS[capability]]
    return list(ARCHS.values()) if every else [ARCHS[90]]


def main() -> int:
    from tests.kernels.kernel_cases import EVERY, SAMPLE

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", action="store_true", help="not a sample: minutes, not seconds")
    parser.add_argument("--arch", type=int, choices=ARCHS, help="one alone: 80 or 90")
    args = parser.parse_args()
    faults = 0
    for arch in chosen(args.arch, every=args.every):
        began = time.monotonic()
        for made in compile_all(arch, EVERY if args.every else SAMPLE):
            fault = check(arch, made)
            faults += bool(fault)
            print(
                f"{made.name}: sm_{arch.capability}, {made.registers} registers, "
                f"{made.spilled} bytes spilled, {made.shared} bytes shared; "
                f"{made.choices} {fault}".rstrip()
            )
        for fault in count_steady(arch):
            faults += 1
            print(fault)
        print(f"sm_{arch.capability}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
