"""Every kernel compiles for an H100, whether there is one here or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    *(
        "attend",
        "join",
        "_add_norm",
        "_activation_mul",
        "_rotary",
        "_filter_floor",
        "_gumbel_argmax",
    ),
    *("_penalize", "_copy", "_read", "_block_sums", "_in_order", "_linear", "_add_parts"),
}


@pytest.mark.timeout(600)
def test_every_kernel_compiles() -> None:
    """In a process of its own, because the interpreter is chosen when triton is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.ahead_of_time"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == KERNELS
