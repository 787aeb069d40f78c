"""What 8-bit transfers do to a model's output: logits after a prompt whose KV travelled.

    prompt ─▶ computed ─▶ units ─▶ [--transfer-dtype] ─▶ blocks of a second store ┐
                  └──────────────── the same blocks ─────────────────────────────┤
    continuation (real text): logits at each of its tokens on either ◀───────────┘

The path is the product's own (runner, gather, scatter). The model is the bundled one by default.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from baton.bundled_model import DEFAULT_MODEL
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from kvtransfer.relay import gather, layers_of, scatter
from kvtransfer.units import units_of
from wire.geometry import SCALED_DTYPES, Geometry
from wire.types import SamplingParams

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Difference:
    """Between the logits of the continuation after a transfer and without one."""

    largest: float
    mean: float
    agreement: float  # of the likeliest tokens
    nats: float  # by which the true next token becomes less likely


class Side:
    """A model on a store of its own."""

    def __init__(self, loaded: LoadedModel, num_blocks: int) -> None:
        self.store = KVStore(loaded.kv_layout(BLOCK_SIZE), num_blocks)
        self._runner = ModelRunner(loaded, self.store)

    def run(self, tokens: list[int], start: int) -> Tensor:
        """Compute the tokens from `start` on; logits [T, vocab]."""
        sampling = SamplingParams(prompt_logprobs=1)
        request = Request("r", tokens, len(tokens), sampling, len(tokens) + 1)
        request.prefill_only = True  # else the prompt has no logits
        request.block_table = list(range(self.store.layout.num_blocks(len(tokens))))
        return self._runner.run(StepPlan((ScheduledRequest(request, start, len(tokens) - start),)))


def transfer(source: KVStore, target: KVStore, num_tokens: int, geometry: Geometry) -> None:
    layout = source.layout
    dtype = geometry.dtype_for(layout)
    for unit in units_of(num_tokens, 0, layout, geometry):
        data = gather(
            unit, [source.block_bytes(unit.block)[layers_of(unit, layout)]], layout, dtype
        )
        scatter(unit, data, target.block_bytes(unit.block), layout, dtype)


def compare(ours: Tensor, theirs: Tensor, following: list[int]) -> Difference:
    gap = (ours - theirs).abs()
    index = torch.tensor(following).unsqueeze(1)
    likely = [logits.log_softmax(-1)[:-1].gather(1, index).mean() for logits in (ours, theirs)]
    return Difference(
        float(gap.max()),
        float(gap.mean()),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        float(likely[1] - likely[0]),
    )


def make_texts(model: Path, length: int, count: int) -> list[list[int]]:
    """Windows of Python's own library."""
    from tokenizers import Tokenizer

    files = (Path(m.__file__) for m in (argparse, json, statistics) if m.__file__)
    source = "\n".join(path.read_text() for path in files)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens: list[int] = tokenizer.encode(source, add_special_tokens=False).ids
    step = (len(tokens) - length) // count
    return [tokens[i * step : i * step + length] for i in range(count)]


def measure(loaded: LoadedModel, text: list[int], num_prompt: int) -> dict[str, Difference]:
    first, second = (Side(loaded, -(-len(text) // BLOCK_SIZE)) for _ in range(2))
    first.run(text[:num_prompt], 0)
    prompt_only = first.store.blocks.clone()
    theirs = first.run(text, num_prompt)
    first.store.blocks.copy_(prompt_only)
    found = {}
    for dtype in ("stored", "bfloat16", *SCALED_DTYPES):
        second.store.blocks.zero_()
        transfer(first.store, second.store, num_prompt, Geometry(dtype=dtype))
        ours = second.run(text, num_prompt)
        found[dtype] = compare(ours, theirs, text[num_prompt + 1 :])
    return found


def main() -> None:
    """Print a line per type and one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--prompt", type=int, default=512, help="tokens whose KV travels")
    parser.add_argument("--continuation", type=int, default=128, help="tokens that are compared")
    parser.add_argument("--texts", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(args.model, dtype="float32")
    texts = make_texts(args.model, args.prompt + args.continuation, args.texts)
    results = [measure(loaded, text, args.prompt) for text in texts]
    summary = {dtype: summarize([r[dtype] for r in results]) for dtype in results[0]}
    for dtype, figures in summary.items():
        print(f"{dtype:10s}", *(f"{name} {value:.3g}" for name, value in figures.items()))
    print(json.dumps(summary))


def summarize(found: list[Difference]) -> dict[str, float]:
    return {
        "max_logit_difference": max(d.largest for d in found),
        "mean_logit_difference": statistics.fmean(d.mean for d in found),
        "top1_agreement": statistics.fmean(d.agreement for d in found),
        "nats_lost_per_token": statistics.fmean(d.nats for d in found),
    }


if __name__ == "__main__":
    main()
