"""Logging as every process of the fleet sets it up: one line per event, on stderr."""

from __future__ import annotations

import logging
import sys


def set_up_logging(process: str, level: str = "info") -> None:
    """Log to stderr, each line with the process's name in front."""
    logging.basicConfig(
        level=level.upper(),
        format=f"%(asctime)s {process} %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("asyncio", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
