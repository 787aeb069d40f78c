"""KV blocks between two processes: the rate of each transport, and what the same bytes cost bare.

A handoff is the product's own: grant, units under a lease, commit. It is timed on the decode node
from the first unit's arrival to the commit, beside its floor in the same round:

    shm  one thread copies the same blocks with memcpy
    zmq  a bare TCP socket, received in place
    ucx  a bare ucxx loop

Without digests the sealer is replaced in both processes; there is no such switch in the product.
Then a fleet with the 88 M random model says how much of a prompt's KV leaves while it is computed.
The last line is one JSON object; a figure that was not measured is null.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from baton.config import UCX_ENVIRONMENT
from benchmarks.bench_serve import make_random_model
from benchmarks.quiet import is_quiet
from benchmarks.serve.overlap import Overlap, measure_overlap
from benchmarks.transfer_receiver import FLOORS, Case, Rates, measure
from kvtransfer.ucx_worker import why_unavailable

BLOCK_KB = (16, 64, 96, 384, 1024)  # 384: of the 88 M model
OFF_ON = ("off", "on")
Figures = dict[str, float | None]


def measure_rates(cases: Iterable[Case], rounds: int) -> dict[Case, Rates]:
    """A line per case."""
    found: dict[Case, Rates] = {}
    print("transport  block KB  blocks   units  digests   GB/s  floor  ratio  best")
    for case in cases:
        found[case] = rates = asyncio.run(measure(case, rounds))
        print(
            f"{case.transport:9}  {case.block_bytes >> 10:8}  {case.num_blocks:6}"
            f"  {case.num_units:6}  {OFF_ON[case.digests]:7}  {rates.transfer:5.2f}"
            f"  {rates.floor:5.2f}  {rates.ratio:5.2f}  {rates.best_ratio:4.2f}",
            flush=True,
        )
    return found


def rate_figures(found: dict[Case, Rates], block_bytes: int) -> Figures:
    """The figures of one block size."""
    figures: Figures = {}
    for transport, floor in FLOORS.items():
        for digests, suffix in ((False, ""), (True, "_digests")):
            rates = found.get(Case(transport, block_bytes, digests))
            name = f"{transport}_vs_{floor}{suffix}"
            figures[name] = round(rates.ratio, 3) if rates else None
            figures[f"{name}_best"] = round(rates.best_ratio, 3) if rates else None
    for way in ("", "_best"):
        bare, sealed = (figures[f"shm_vs_memcpy{kind}{way}"] for kind in ("", "_digests"))
        figures[f"digest_cost_shm{way}"] = round(1 - sealed / bare, 3) if bare and sealed else None
    return figures


def measure_overlaps(transports: Iterable[str], num_requests: int) -> dict[str, Overlap]:
    """A line per transport."""
    found: dict[str, Overlap] = {}
    print("transport  left before the end  tail ms  second token ms  steps  step ms")
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        model = Path(folder) / "m88"
        make_random_model(model)
        for transport in transports:
            overlap = measure_overlap(Path(folder), model, transport, num_requests)
            found[transport], second = overlap, overlap.second
            print(
                f"{transport:9}  {overlap.early:19.1%}  {overlap.tail_ms:7.1f}"
                f"  {second.second_ms:15.1f}  {second.steps:5.2f}  {second.step_ms:7.1f}",
                flush=True,
            )
    return found


def overlap_figures(found: dict[str, Overlap]) -> Figures:
    """Those of the worst transport, and each one's."""
    figures: Figures = {
        "bytes_before_last_chunk_end": min((o.early for o in found.values()), default=None),
        "first_to_second_token_steps": max((o.second.steps for o in found.values()), default=None),
    }
    for transport, overlap in found.items():
        figures[f"bytes_before_last_chunk_end_{transport}"] = overlap.early
        figures[f"first_to_second_token_steps_{transport}"] = overlap.second.steps
        figures[f"tail_ms_{transport}"] = overlap.tail_ms
    return {name: value and round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    os.environ.update(UCX_ENVIRONMENT)
    here = [name for name in FLOORS if name != "ucx" or why_unavailable() is None]
    parser.add_argument("--transports", nargs="+", default=here, choices=FLOORS)
    parser.add_argument("--block-kb", nargs="+", type=int, default=BLOCK_KB)
    parser.add_argument("--rounds", type=int, default=40, help="handoffs per case")
    parser.add_argument(
        "--requests", type=int, default=9, help="prompts per transport; 0: no fleet"
    )
    args = parser.parse_args()
    quiet = is_quiet()
    torch.set_num_threads(1)
    cases = [
        Case(transport, block_kb << 10, digests)
        for transport in args.transports
        for block_kb in args.block_kb
        for digests in (False, True)
    ]
    rates = measure_rates(cases, args.rounds)
    overlaps = measure_overlaps(args.transports, args.requests) if args.requests else {}
    by_block = {f"{kb} KB": rate_figures(rates, kb << 10) for kb in args.block_kb}
    figures = by_block[f"{max(args.block_kb)} KB"] | overlap_figures(overlaps)
    print(json.dumps({**figures, "quiet": quiet, "by_block": by_block}))


if __name__ == "__main__":
    main()
