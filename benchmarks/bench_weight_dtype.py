"""What narrow weights do to a model's output: logits over real text, against those in fp32.

The model is the bundled one by default. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from baton.bundled_model import DEFAULT_MODEL
from benchmarks.bench_transfer_dtype import BLOCK_SIZE, Side, make_texts
from engine.loader import load_model
from kernels.weights import STORAGES


def logits_of(model: Path, storage: str, texts: list[list[int]]) -> list[Tensor]:
    """[tokens, vocabulary] of each text."""
    loaded = load_model(model, dtype="float32", weight_dtype=storage)
    side = Side(loaded, -(-len(texts[0]) // BLOCK_SIZE))
    return [side.run(text, 0) for text in texts]


def compare(ours: list[Tensor], theirs: list[Tensor], texts: list[list[int]]) -> dict[str, float]:
    """`theirs` are the exact ones."""
    found, exact = torch.cat(ours), torch.cat(theirs)
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_max": float(divergence.max()),
        "top1_agreement": float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
        "perplexity": perplexity(ours, texts),
        "largest_difference": float((found - exact).abs().max()),
    }


def perplexity(logits: list[Tensor], texts: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(text[1:]), reduction="sum")
        for rows, text in zip(logits, texts, strict=True)
    ]
    return math.exp(float(sum(losses)) / sum(len(text) - 1 for text in texts))


def main() -> None:
    """Print a line per storage and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = make_texts(args.model, args.length, args.texts)
    exact = logits_of(args.model, "float32", texts)
    summary = {}
    for storage in STORAGES:
        found = exact if storage == "float32" else logits_of(args.model, storage, texts)
        summary[storage] = compare(found, exact, texts)
        print(f"{storage:10}", *(f"{k} {v:.3g}" for k, v in summary[storage].items()), flush=True)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
