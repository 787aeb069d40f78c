#!/usr/bin/env python3
"""Writes the synthetic trace samples of `tuner/samples`, one file per format; see `--help`.

They show the formats and serve the tests. Nothing in them was recorded: lengths are drawn from
log-normal distributions, arrivals are Poisson, prompts are made of a few words.
"""

import argparse
import json
import random
import sys
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tuner.arrivals import Arrival, arrival_offsets
from tuner.trace_files import MOONCAKE_BLOCK
from tuner.workload import WORDS

SAMPLES_FOLDER = Path(__file__).resolve().parents[1] / "tuner" / "samples"
NUM_REQUESTS = 40
RATE = 2.0
NUM_CONVERSATIONS = 8
START = datetime(2024, 1, 1, tzinfo=UTC)


def lengths(rng: random.Random, median_in: int, median_out: int) -> tuple[int, int]:
    draw = rng.lognormvariate
    return 1 + int(median_in * draw(0, 0.7)), 1 + int(median_out * draw(0, 0.5))


def offsets() -> list[float]:
    return list(islice(arrival_offsets(RATE, Arrival.POISSON, 1), NUM_REQUESTS))


def mooncake() -> str:
    """Conversations that grow: each turn's prompt begins with all full blocks of the one before."""
    rng = random.Random("mooncake")
    system, next_id = [0], 1
    histories = [list(system) for _ in range(NUM_CONVERSATIONS)]
    lines = []
    for offset in offsets():
        history = rng.choice(histories)
        num_in, num_out = lengths(rng, 900, 150)
        ids = history + list(range(next_id, next_id + 1 + num_in // MOONCAKE_BLOCK))
        next_id += len(ids) - len(history)
        history[:] = ids[:-1]
        entry = {
            "timestamp": round(offset * 1000),
            "input_length": (len(ids) - 1) * MOONCAKE_BLOCK + 1 + num_in % MOONCAKE_BLOCK,
            "output_length": num_out,
            "hash_ids": ids,
        }
        lines.append(json.dumps(entry))
    return "\n".join(lines) + "\n"


def azure() -> str:
    rng = random.Random("azure")
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for offset in offsets():
        at = (START + timedelta(seconds=offset)).strftime("%Y-%m-%d %H:%M:%S.%f")
        num_in, num_out = lengths(rng, 900, 150)
        lines.append(f"{at}0,{num_in},{num_out}")
    return "\n".join(lines) + "\n"


def burstgpt() -> str:
    rng = random.Random("burstgpt")
    lines = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    for offset in offsets():
        num_in, num_out = lengths(rng, 400, 200)
        total = num_in + num_out
        lines.append(f"{offset:.3f},synthetic,{num_in},{num_out},{total},Conversation log")
    return "\n".join(lines) + "\n"


def prompts() -> str:
    rng = random.Random("prompts")
    lines = []
    for _ in range(NUM_REQUESTS):
        text = " ".join(rng.choices(WORDS, k=rng.randint(5, 40)))
        lines.append(json.dumps({"prompt": text, "output_tokens": rng.randint(8, 64)}))
    return "\n".join(lines) + "\n"


SAMPLES = {
    "mooncake.jsonl": mooncake,
    "azure.csv": azure,
    "burstgpt.csv": burstgpt,
    "prompts.jsonl": prompts,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=SAMPLES_FOLDER, metavar="FOLDER")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in SAMPLES.items():
        (folder / name).write_text(make())


if __name__ == "__main__":
    main()
