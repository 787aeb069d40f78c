"""Where the models that ship with the project lie."""

from __future__ import annotations

from pathlib import Path

BUNDLED = Path(__file__).parent / "bundled"
DEFAULT_MODEL = BUNDLED / "baton-7m"
