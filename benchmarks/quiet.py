"""Whether the machine is quiet enough for timings to mean something."""

from __future__ import annotations

import os

QUIET_LOAD = 0.5  # processes that want to run besides this one


def is_quiet() -> bool:
    """Whether this machine had next to nothing to do in the last minute; says so if not."""
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        print(f"the machine is busy (load {load:.1f}): the figures say little")
    return load <= QUIET_LOAD
