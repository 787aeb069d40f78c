"""Block-major against layer-major KV pools: decode attention, and collecting a block to send.

    block-major  [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]   (Baton's)
    layer-major  [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]

Both pools hold the same content; the attention is the one that serves. Ratios are medians of pairs
that ran one after the other, so that a busy machine changes both sides alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

import torch

from kernels.paged_attention import RequestRows
from kernels.paged_attention_sdpa import paged_attention_sdpa

LAYERS, HEADS, KV_HEADS, SIZE, BLOCK = 12, 12, 4, 64, 16  # the 88 M model


def main() -> None:
    """Measure, print a line per case and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    num_blocks = 2 * args.requests * -(-args.context // BLOCK)
    block_major = torch.randn(num_blocks, LAYERS, 2, BLOCK, KV_HEADS, SIZE)
    layer_major = block_major.permute(1, 2, 0, 3, 4, 5).contiguous()
    rows = make_rows(args.requests, args.context, num_blocks)
    query = torch.randn(args.requests, HEADS, SIZE)

    def attend(view: Callable[[int, int], torch.Tensor]) -> None:
        for layer in range(LAYERS):
            paged_attention_sdpa(query, view(layer, 0), view(layer, 1), rows, scale=SIZE**-0.5)

    attention = ratio(
        lambda: attend(lambda layer, kv: block_major[:, layer, kv]),
        lambda: attend(lambda layer, kv: layer_major[layer, kv]),
        args.pairs,
    )
    collect = ratio(
        lambda: [block_major[block].clone() for block in range(32)],
        lambda: [layer_major[:, :, block].contiguous() for block in range(32)],
        args.pairs,
    )
    print(f"decode attention, block-major / layer-major: {attention:.2f}")
    print(f"collecting 32 blocks, block-major / layer-major: {collect:.2f}")
    print(json.dumps({"attention_ratio": round(attention, 3), "collect_ratio": round(collect, 3)}))


def make_rows(num_requests: int, context: int, num_blocks: int) -> list[RequestRows]:
    """One decode row per request, its blocks scattered over the pool."""
    free = random.Random(0).sample(range(num_blocks), num_blocks)
    per_request = -(-context // BLOCK)
    return [
        RequestRows(i, 1, context, torch.tensor(free[i * per_request : (i + 1) * per_request]))
        for i in range(num_requests)
    ]


def ratio(ours: Callable[[], object], theirs: Callable[[], object], pairs: int) -> float:
    """Median of our time over theirs, pair by pair."""
    ratios = [seconds(ours) / seconds(theirs) for _ in range(pairs + 3)]
    return statistics.median(ratios[3:])


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
