#!/usr/bin/env python3
"""Trains the small model that ships with Baton; see `--help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bundled_model.cli import main

if __name__ == "__main__":
    main()
