"""Compiles Triton kernels for an H100 on a machine that has none: what the interpreter forgives,
the compiler does not.

Run as a program, outside of the interpreter: `python -m tests.kernels.ahead_of_time`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

SHARED_MEMORY = 227 << 10  # bytes that a block of threads may have on an H100


class NoDevice:
    """Stands in for Triton's driver, as far as compiling asks it."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY})

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiling(report: Callable[[str, Any], None]) -> Iterator[None]:
    """Launches compile their kernel and do nothing more; `report` is given its name and result."""
    assert not triton.knobs.runtime.interpret
    launch = triton.JITFunction.run

    def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(function, *args, grid=grid, warmup=True, **options)
        report(function.fn.__name__, compiled)

    triton.runtime.driver.set_active(NoDevice())  # which stays: there may be no other
    triton.JITFunction.run = compile_only
    try:
        yield
    finally:
        triton.JITFunction.run = launch


def check(name: str, compiled: Any) -> None:
    """Print what was made; more shared memory than there is would fail at the first launch."""
    shared = compiled.metadata.shared
    print(f"{name}: {shared} bytes shared, {len(compiled.asm['cubin'])} bytes of code")
    assert shared <= SHARED_MEMORY, f"{name} wants {shared} bytes of shared memory"


def main() -> None:
    from tests.kernels.kernel_cases import CASES

    with mock.patch("kernels.triton_attention.num_processors", return_value=132), compiling(check):
        for case in CASES:
            case()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
