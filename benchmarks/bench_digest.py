"""What a digest costs beside the copy that it protects: the candidates and their strengths.

Units are copied from one memory to another, both far larger than the caches, with and without a
digest of the copy, in turns; the share is that of the digest in the time of both.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from benchmarks.digests import Candidate, Make, candidates, copy_alone

MEMORY_BYTES = 64 << 20
UNIT_KB = (16, 64, 98, 384, 1024)


def seconds_of(copy: Make, source: memoryview, target: memoryview, unit_bytes: int) -> float:
    """All units of the memory, once."""
    starts = range(0, MEMORY_BYTES - unit_bytes + 1, unit_bytes)
    pairs = [(source[at : at + unit_bytes], target[at : at + unit_bytes]) for at in starts]
    started = time.perf_counter()
    for theirs, ours in pairs:
        copy(theirs, ours)
    return time.perf_counter() - started


def measure(found: list[Candidate], unit_kb: int, rounds: int) -> tuple[float, dict[str, float]]:
    """GB/s of the copy alone, and per candidate the digest's share of copy and digest.

    Of many rounds the best one counts, because others' work can only add time.
    """
    source, target = (memoryview(np.full(MEMORY_BYTES, n, np.uint8).data) for n in (1, 2))
    unit_bytes = unit_kb << 10
    times: dict[str, list[float]] = {name: [] for name in ("", *(c.name for c in found))}
    for _ in range(rounds):
        times[""].append(seconds_of(copy_alone, source, target, unit_bytes))
        for each in found:
            times[each.name].append(seconds_of(each.copy, source, target, unit_bytes))
    floor = min(times.pop(""))
    num_bytes = MEMORY_BYTES // unit_bytes * unit_bytes
    return num_bytes / 1e9 / floor, {name: 1 - floor / min(t) for name, t in times.items()}


def main() -> None:
    """Measure, print a line per candidate and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unit-kb", nargs="+", type=int, default=UNIT_KB)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    found, missing = candidates()
    shares: dict[str, dict[str, float]] = {each.name: {} for each in found}
    copies = {}
    for unit_kb in args.unit_kb:
        rate, by_name = measure(found, unit_kb, args.rounds)
        copies[f"{unit_kb} KB"] = round(rate, 2)
        for name, share in by_name.items():
            shares[name][f"{unit_kb} KB"] = round(share, 3)
    print("digest's share of copy and digest" + " " * 18, *(f"{size:>7}" for size in copies))
    for each in found:
        row = (f"{100 * share:5.0f} %" for share in shares[each.name].values())
        print(f"{each.name:24} {each.strength:26}", *row)
    print(f"{'copy alone, GB/s':51}", *(f"{rate:7.1f}" for rate in copies.values()))
    for package in missing:
        print(f"not measured, because {package} is not installed")
    print(json.dumps({"copy_gb_s": copies, "digest_share": shares, "missing": missing}))


if __name__ == "__main__":
    main()
