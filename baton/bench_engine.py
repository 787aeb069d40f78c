"""`baton bench engine`: whole steps of the engine alone, without a network, and where they go."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from baton.bundled_model import DEFAULT_MODEL
from engine.config import EngineConfig
from engine.device import is_gpu
from engine.engine import Engine
from engine.graphs import CudaCapture, ladder
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from engine.spans import Recorder, Span, Spans, no_spans
from node.config import STORAGES
from node.devices import parse_device, resolve_device
from telemetry.progress import ProgressLine
from wire.errors import ConfigError
from wire.types import SamplingParams

BLOCK_SIZE = 16
STAGES = ("schedule", "batch", "forward", "sample", "read", "commit")  # others are parts of forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = """\
Measure the engine on this machine: decode steps of several batch sizes, and prefills of several
prompt lengths. Other work on the machine makes the figures worthless.

  baton bench engine ./my-model --batch 1 8 32 --context 1000
  baton bench engine ./my-model --profile --trace steps.json    for chrome://tracing, Perfetto"""
    add = parser.add_argument
    add("model", nargs="?", type=Path, default=DEFAULT_MODEL, metavar="MODEL", help="(the bundled)")
    add("--batch", type=_count, nargs="+", default=[1, 8, 16], metavar="N", help="(1 8 16)")
    add("--context", type=_count, default=300, metavar="N", help="tokens before decoding (300)")
    add("--prompt", type=_count, nargs="+", default=[256], metavar="N", help="prefills of (256)")
    add("--steps", type=_count, default=20, metavar="N", help="measured per case (20)")
    add("--temperature", type=float, default=0.0, help="0: greedy (0)")
    add("--top-p", type=float, default=1.0, help="where the temperature is above 0 (1)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", type=parse_device, default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--weight-dtype", default="auto", choices=["auto", *STORAGES], help="as the nodes' (auto)")
    add("--threads", type=_count, default=None, metavar="N", help="compute threads (torch's own)")
    add("--no-fusing", action="store_true", help="the model as transformers wrote it")
    add("--profile", action="store_true", help="show the parts of a step; costs some time itself")
    add("--trace", type=Path, metavar="FILE", help="write all parts of all steps as Chrome's trace")
    add("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError where the model cannot be loaded or the trace not be written."""
    if args.threads:
        torch.set_num_threads(args.threads)
    with ProgressLine(f"loading {args.model.name}") as progress:
        loaded = load_model(
            args.model,
            dtype=args.dtype,
            weight_dtype=args.weight_dtype,
            device=resolve_device(args.device),
            fusing=not args.no_fusing,
            progress=progress.update,
        )
    _check_lengths(args, loaded)
    recorder = Recorder(time.perf_counter) if args.profile or args.trace else None
    bench = EngineBench(loaded, _Load.of(args), recorder)
    cases = [bench.decode(batch) for batch in args.batch]
    cases += [bench.prefill(length) for length in args.prompt]
    _publish(loaded, cases, args)
    if args.trace:
        _write_trace(args.trace, cases)
    return 0


@dataclass(frozen=True, slots=True)
class _Load:
    """What is asked of the engine."""

    context: int
    steps: int
    max_batch: int
    max_prompt: int
    temperature: float
    top_p: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> _Load:
        batch, prompt = max(args.batch), max(args.prompt)
        return cls(args.context, args.steps, batch, prompt, args.temperature, args.top_p)


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    tokens_per_step: int
    seconds: list[float] = field(default_factory=list)  # of each step
    spans: list[Span] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def parts(self) -> dict[str, float]:
        """Mean seconds per step by part; what forward has besides its parts is its glue."""
        total: dict[str, float] = {}
        for span in self.spans:
            total[span.name] = total.get(span.name, 0.0) + span.seconds / len(self.seconds)
        inner = {name: value for name, value in total.items() if name not in STAGES}
        stages = {name: total.get(name, 0.0) for name in STAGES}
        return stages | inner | {"glue": stages["forward"] - sum(inner.values())}


class EngineBench:
    """A loaded model, and engines made of it."""

    def __init__(self, loaded: LoadedModel, load: _Load, recorder: Recorder | None) -> None:
        self._load, self._recorder = load, recorder
        if recorder is not None:
            loaded = replace(loaded, ops=recorder.watched(loaded.ops))
        self._loaded = loaded
        layout = loaded.kv_layout(BLOCK_SIZE)
        self._max_len = max(load.context, load.max_prompt) + load.steps + 2
        self._num_blocks = (load.max_batch + 1) * layout.num_blocks(self._max_len)
        self._store = KVStore(layout, self._num_blocks + 1, loaded.device)

    def decode(self, batch: int) -> Case:
        """Steps of requests whose prompts are computed."""
        case = Case(f"decode {batch}", batch)
        engine = self._engine()
        for number in range(batch):
            engine.add(self._request(number, self._load.context))
        engine.step()
        engine.step()  # warms up
        with self._recording(case):
            case.seconds.extend(_timed(engine) for _ in range(self._load.steps))
        return case

    def prefill(self, length: int) -> Case:
        """Steps that compute one prompt each."""
        case = Case(f"prefill {length}", length)
        for number in range(1 + max(2, self._load.steps // 4)):
            engine = self._engine()
            engine.add(self._request(number, length))
            if not number:  # warms up
                engine.step()
                continue
            with self._recording(case):
                case.seconds.append(_timed(engine))
        return case

    def _engine(self) -> Engine:
        spans = self._recorder or no_spans
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            max_model_len=self._max_len,
            max_num_seqs=self._load.max_batch,
            max_num_batched_tokens=self._load.max_batch * self._max_len,
            enable_prefix_caching=False,
        )
        return Engine(
            config,
            self._runner(spans),
            epoch=1,
            model_fingerprint="bench",
            eos_token_ids=frozenset(),
            ops=self._loaded.ops,
            grammars=None,
            spans=spans,
        )

    def _runner(self, spans: Spans) -> ModelRunner:
        """On a GPU with the graphs that a node has; not where parts are noted: a graph has none."""
        runner = ModelRunner(self._loaded, self._store, spans)
        if is_gpu(self._loaded.device) and self._recorder is None:
            capture = CudaCapture(runner.device)
            runner.capture(ladder(self._load.max_batch), self._max_len, capture, self._num_blocks)
        return runner

    def _request(self, number: int, num_tokens: int) -> Request:
        rng, load = random.Random(number), self._load
        return Request(
            request_id=str(number),
            tokens=[rng.randrange(self._loaded.vocab_size) for _ in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            sampling=SamplingParams(
                seed=number,
                max_tokens=load.steps + 2,
                temperature=load.temperature,
                top_p=load.top_p,
                ignore_eos=True,
            ),
            max_num_tokens=num_tokens + load.steps + 2,
        )

    @contextmanager
    def _recording(self, case: Case) -> Iterator[None]:
        """Spans of these steps become the case's."""
        recorder = self._recorder
        if recorder is not None:
            recorder.spans.clear()
        with recorder.modules() if recorder else nullcontext():
            yield
        if recorder is not None:
            case.spans.extend(recorder.spans)


def _timed(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def _check_lengths(args: argparse.Namespace, loaded: LoadedModel) -> None:
    longest = max(args.context, *args.prompt) + args.steps + 2
    if longest > loaded.max_model_len:
        raise ConfigError(
            f"--context or --prompt with {args.steps} steps comes to {longest} tokens; "
            f"{loaded.name} takes {loaded.max_model_len}"
        )


def _publish(loaded: LoadedModel, cases: list[Case], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({"model": loaded.name, "cases": [_as_json(c, args) for c in cases]}))
        return
    console = Console(highlight=False)
    console.print(
        f"{loaded.name}: {loaded.architecture}, {loaded.fusions}, operations {loaded.ops.name}, "
        f"{torch.get_num_threads()} threads",
        soft_wrap=True,
        markup=False,
    )
    table = Table("step", "ms, median", "best", "tokens/s", box=None, padding=(0, 3, 0, 0))
    for case in cases:
        rate = case.tokens_per_step / case.median
        figures = (f"{1e3 * case.median:.2f}", f"{1e3 * min(case.seconds):.2f}", f"{rate:,.0f}")
        table.add_row(case.name, *figures)
    console.print(table)
    if args.profile:
        console.print(_profile_table(cases))


def _as_json(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    found = {"name": case.name, "ms": [round(1e3 * s, 4) for s in case.seconds]}
    parts = {name: round(1e3 * s, 4) for name, s in case.parts().items()}
    return found | ({"parts_ms": parts} if args.profile else {})


def _profile_table(cases: list[Case]) -> Table:
    """Milliseconds per step by part; the parts of forward stand below it."""
    found = [case.parts() for case in cases]
    inner = sorted({name for parts in found for name in parts if name not in STAGES})
    table = Table("ms per step", *(c.name for c in cases), box=None, padding=(0, 3, 0, 0))
    for name in STAGES:
        table.add_row(name, *(f"{1e3 * parts[name]:.2f}" for parts in found))
        if name == "forward":
            for part in inner:
                table.add_row(f"  {part}", *(f"{1e3 * parts.get(part, 0):.2f}" for parts in found))
    return table


def _write_trace(path: Path, cases: list[Case]) -> None:
    """Trace events as Chrome's tracing and Perfetto read them, one process per case."""
    events: list[dict[str, Any]] = []
    for number, case in enumerate(cases):
        events.append(
            {"ph": "M", "name": "process_name", "pid": number, "args": {"name": case.name}}
        )
        events += [
            {
                "ph": "X",
                "name": span.name,
                "cat": "stage" if span.name in STAGES else "module",
                "ts": round(1e6 * span.start, 3),
                "dur": round(1e6 * span.seconds, 3),
                "pid": number,
                "tid": 0,
            }
            for span in case.spans
        ]
    try:
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}: open it in chrome://tracing or ui.perfetto.dev", file=sys.stderr)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
