"""`make bench-api`: what the router's HTTP side costs; the last line of the output is JSON.

- `frontend_ms_beyond_tokenizer`: from a chat's body to the first message for a decode node,
  less the tokenizer's own time in the same round (median of a 1,000-token chat)
- `sse_tokens_per_s`: tokens through one router process, one frame each, over 200 streams
- `sse_vs_bare_aiohttp`: the same beside a bare aiohttp server that writes prebuilt frames

The last two exist per second of the server's processor time too, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.api.frontend import measure_frontend
from benchmarks.api.sse import measure_sse

PARTS: dict[str, Callable[[Path, bool], dict[str, float]]] = {
    "frontend": measure_frontend,
    "sse": measure_sse,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="measure this part")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that `finally` runs
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        for name in args.only or PARTS:
            figures |= PARTS[name](Path(folder), args.quick)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
