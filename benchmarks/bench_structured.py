"""What grammars cost: a decode step with masks beside one without, and compiling a tool's schema.

examples:
  make bench-structured
  make bench-structured ARGS="--turns 3"

Steps of 16 requests of the 88 M random model are taken in turns, a few without a grammar and a few
with one (an array of tool calls that does not end), both sampled. `grammar_step_overhead` is the
median of the turns' ratios, less one. Schemas are compiled by the engine as a node does it, once
new and once again; `check_ms_p50` is the router's share. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_engine import MAX_BATCH, STEPS, Bench, timed
from benchmarks.make_model import make_model
from benchmarks.quiet import is_quiet
from engine.engine import Engine
from engine.grammar import Grammars
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from router.structured import json_grammar
from router.tools.use import TOOL_WHITESPACE
from wire.grammar import GrammarChecker

NUM_NEW = 40  # of each schema, each with another name

TEXT = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "location": {"type": "string", "description": "City and country"},
        "unit": {"enum": ["celsius", "fahrenheit"]},
    },
    "search": {
        "query": TEXT,
        "max_results": {"type": "integer", "minimum": 1, "maximum": 50},
        "sites": {"type": "array", "items": TEXT, "maxItems": 10},
        "since": {"type": "string", "format": "date"},
    },
    "edit_file": {
        "path": TEXT,
        "edits": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "start": {"type": "integer", "minimum": 0},
                    "end": {"type": "integer", "minimum": 0},
                    "text": TEXT,
                },
                "required": ["start", "end", "text"],
                "additionalProperties": False,
            },
        },
        "create": {"type": "boolean"},
    },
    "book": {
        "name": {"type": "string", "maxLength": 60},
        "email": {"type": "string", "pattern": "^[a-z0-9.]{1,30}@[a-z0-9]{1,20}[.][a-z]{2,6}$"},
        "room": {"anyOf": [{"const": "single"}, {"const": "double"}, {"type": "null"}]},
        "guests": {"type": "integer", "minimum": 1, "maximum": 12},
        "at": {"type": "string", "format": "date-time"},
    },
}


def arguments(name: str) -> dict[str, Any]:
    """A tool's schema."""
    properties = SCHEMAS[name]
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def call(name: str, told_as: str) -> dict[str, Any]:
    """The schema of a call."""
    return {
        "type": "object",
        "properties": {"name": {"const": told_as}, "parameters": arguments(name)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def endless() -> str:
    """The grammar of calls without an end."""
    calls = {"anyOf": [call(name, name) for name in SCHEMAS]}
    return json_grammar({"type": "array", "items": calls, "minItems": 300}, TOOL_WHITESPACE)


class GrammarBench(Bench):
    """A bench whose requests have `grammar`."""

    def __init__(self, loaded: LoadedModel, grammars: Grammars) -> None:
        super().__init__(loaded)
        self.grammar = ""
        self._grammars = grammars

    def engine(self) -> Engine:
        engine = super().engine()
        engine._grammars = self._grammars
        return engine

    def request(self, number: int, num_tokens: int, *, sampled: bool = False) -> Request:
        request = super().request(number, num_tokens, sampled=sampled)
        request.sampling = replace(request.sampling, grammar=self.grammar)
        return request


def step_ms(bench: GrammarBench, turns: int) -> tuple[float, float, float]:
    """(ms without, ms with, median of the turns' ratios less one)."""
    plain = bench.decoding(MAX_BATCH, sampled=True)
    bench.grammar = endless()
    held = bench.decoding(MAX_BATCH, sampled=True)
    without, within = [], []
    for turn in range(turns + 1):
        pair = [
            statistics.median(timed(engine.step) for _ in range(STEPS)) for engine in (plain, held)
        ]
        if turn:  # the first turn warms up
            without.append(pair[0])
            within.append(pair[1])
    ratio = statistics.median(b / a for a, b in zip(without, within, strict=True))
    return 1e3 * statistics.median(without), 1e3 * statistics.median(within), ratio - 1


def compile_ms(mistake: Callable[[str], str | None]) -> tuple[float, float]:
    """Medians over tools: (of a schema that is new, of one that was seen)."""
    new, again = [], []
    for name in SCHEMAS:
        for number in range(NUM_NEW):
            grammar = json_grammar(call(name, f"{name}_{number}"), TOOL_WHITESPACE)
            new.append(timed(lambda grammar=grammar: _must_do(mistake, grammar)))  # type: ignore[misc]
            again.append(timed(lambda grammar=grammar: _must_do(mistake, grammar)))  # type: ignore[misc]
    return 1e3 * statistics.median(new), 1e3 * statistics.median(again)


def _must_do(mistake: Callable[[str], str | None], grammar: str) -> None:
    assert mistake(grammar) is None


def measure(folder: Path, turns: int) -> dict[str, float]:
    loaded = load_model(folder, dtype="float32")
    tokenizer = (folder / "tokenizer.json").read_text()
    grammars = Grammars(tokenizer, loaded.vocab_size, (0,))
    plain, held, overhead = step_ms(GrammarBench(loaded, grammars), turns)
    print(f"decode {MAX_BATCH}: {plain:.1f} ms, with grammars {held:.1f} ms", flush=True)
    new, again = compile_ms(grammars.mistake)
    checked, _ = compile_ms(GrammarChecker().mistake)
    print(f"a tool's schema: {new:.2f} ms new, {again:.2f} ms again, {checked:.2f} ms to check")
    figures = {
        "grammar_step_overhead": overhead,
        "compile_ms_p50": new,
        "compile_again_ms_p50": again,
        "check_ms_p50": checked,
    }
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=11, help="of steps without and with")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    quiet = is_quiet()
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as folder:
        figures = measure(make_model(Path(folder) / "m88"), args.turns)
    print(json.dumps({**figures, "threads": args.threads, "quiet": quiet}))


if __name__ == "__main__":
    main()
