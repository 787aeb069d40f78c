"""How often another batch changes a greedy token, where the engine is not deterministic.

    python -m benchmarks.near_ties [--texts 24]

The bundled model reads Python source as prompts, once in large chunks alone and once in chunks of
16 tokens beside others; the most probable next token is compared at every position. With Baton's
fused decoder in float32 it must never differ; elsewhere it differs at near-ties. Counts, no times:
it may run on a busy machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from baton.bundled_model import DEFAULT_MODEL
from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from wire.logprobs import unpack
from wire.types import SamplingParams

BLOCK_SIZE = 16
TEXT_TOKENS = 768
NUM_BLOCKS = 512
TELLING = SamplingParams(max_tokens=1, prompt_logprobs=2)
Best = list[tuple[int, float]]  # by position: the best next token, and how far the second is behind


@dataclass(frozen=True, slots=True)
class Reading:
    """How prompts are computed."""

    chunk: int
    together: int


ALONE = Reading(chunk=256, together=1)
MIXED = Reading(chunk=16, together=4)


def texts(number: int) -> list[list[int]]:
    """Pieces of real source."""
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    source = "".join(Path(m.__file__ or "").read_text() for m in (random, asyncio, argparse, json))
    source += "".join(p.read_text() for p in sorted(Path(asyncio.__file__).parent.glob("*.py")))
    ids: list[int] = tokenizer.encode(source, add_special_tokens=False).ids
    starts = range(0, len(ids) - TEXT_TOKENS, TEXT_TOKENS)
    return [ids[start : start + TEXT_TOKENS] for start in starts][:number]


def read(model: LoadedModel, prompts: list[list[int]], reading: Reading) -> list[Best]:
    """The best next token at every position of every prompt."""
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        max_model_len=TEXT_TOKENS + 1,
        max_num_seqs=reading.together,
        max_num_batched_tokens=reading.chunk * reading.together,
        long_prefill_token_threshold=reading.chunk,
        enable_prefix_caching=False,
    )
    runner = ModelRunner(model, KVStore(model.kv_layout(BLOCK_SIZE), NUM_BLOCKS))
    eos = frozenset(model.eos_token_ids)
    engine = Engine(
        config, runner, epoch=1, model_fingerprint="m", eos_token_ids=eos, ops=model.ops
    )
    for number, prompt in enumerate(prompts):
        length = len(prompt)
        request = Request(str(number), list(prompt), length, TELLING, length + 1, prefill_only=True)
        engine.add(request)
    found: dict[int, Best] = {}
    while engine.has_work():
        result = engine.step()
        assert result is not None
        for progress in result.progress:
            if progress.logprobs is not None:
                found[int(progress.request_id)] = [_best(row) for row in progress.logprobs.prompt]
                engine.release_held(progress.request_id)
    return [found[number] for number in range(len(prompts))]


def _best(row: bytes) -> tuple[int, float]:
    (token, first), (_, second) = unpack(row).top
    return token, first - second


def measure(dtype: str, fusing: bool, prompts: list[list[int]]) -> dict[str, float]:
    """Positions whose best token depends on the batch, of how many, and the largest gap there."""
    model = load_model(DEFAULT_MODEL, dtype=dtype, fusing=fusing)
    before, after = (read(model, prompts, reading) for reading in (ALONE, MIXED))
    pairs = [
        (one, other)
        for a, b in zip(before, after, strict=True)
        for one, other in zip(a, b, strict=True)
    ]
    gaps = [max(one[1], other[1]) for one, other in pairs if one[0] != other[0]]
    return {"positions": len(pairs), "differ": len(gaps), "largest_gap": max(gaps, default=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=24, help="prompts of 768 tokens")
    prompts = texts(parser.parse_args().texts)
    torch.set_num_threads(1)
    figures = {}
    for dtype, fusing in (("float32", True), ("float32", False), ("bfloat16", False)):
        name = f"{dtype}, {'fused decoder' if fusing else 'modules of transformers'}"
        figures[name] = measure(dtype, fusing, prompts)
        print(f"{name}: {figures[name]}", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
