"""Loads on real nodes and on simulated ones, by the same traces."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import simulate
from benchmarks.serve.fleet import serving
from benchmarks.serve.processes import BATON, ROOT
from engine.config import EngineConfig
from tuner.arrivals import Arrival, arrival_offsets
from tuner.goodput import Slo
from tuner.latency import LatencyModel
from tuner.profile import Profile, load_profile
from tuner.report import summarize
from tuner.trace import Trace, TracedRequest, scale_rate
from tuner.workload import PromptKind, Span, Workload, requests

MAX_MODEL_LEN = 2048
KV_BYTES = 256 << 20
CHUNK = 512
MAX_NUM_SEQS = 64
TTFT_TIMES, TPOT_TIMES = 4.0, 2.5  # limits, in times of an unloaded request's


@dataclass(frozen=True, slots=True)
class Bench:
    """A model, where files may lie, and how long measuring may take."""

    model: Path
    folder: Path
    profile_s: float

    @contextmanager
    def fleet(self, *nodes: str, chunk: int = CHUNK) -> Iterator[str]:
        """Real nodes of one thread each; gives their URL.

        Every prompt is handed over where it can be, unless the flags in `nodes` say otherwise.
        """
        flags: list[str | Path] = [
            self.model,
            "--threads",
            "1",
            "--max-model-len",
            str(MAX_MODEL_LEN),
        ]
        limits = ["--kv-memory", str(KV_BYTES), "--max-num-seqs", str(MAX_NUM_SEQS)]
        budget = ["--max-num-batched-tokens", str(chunk), "--control-port", "0"]
        budget += ["--handoff", "always"]
        with serving(self.folder, [*flags, *limits, *budget, *nodes]) as (_, url):
            yield url

    def profile(self, url: str) -> Profile:
        """What the engine takes, measured beside the idle fleet, and the fleet's overheads."""
        path = self.folder / "profile.json"
        limits = ["--seconds", f"{self.profile_s:g}", "--max-model-len", str(MAX_MODEL_LEN)]
        fleet = ["--fleet", url, "--chunk", str(CHUNK)]
        command = [str(BATON), "profile", str(self.model), "-o", str(path), *limits, *fleet]
        subprocess.run(command, check=True, cwd=ROOT)
        return load_profile(path)


def setup_of(profile: Profile, split: Split, chunk: int = CHUNK) -> Setup:
    """The simulated twin of a fleet of `Bench.fleet`."""
    engine = EngineConfig(
        block_size=profile.layout.block_size,
        num_blocks=KV_BYTES // profile.layout.block_bytes,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=chunk,
    )
    return Setup(split, engine, profile.layout, profile.latency, profile.overheads)


def drawn(
    name: str, number: int, input_len: Span, output_len: Span, seed: int, rate: float = 1.0
) -> Trace:
    """Poisson arrivals of requests of uniform lengths."""
    workload = Workload(input_len, output_len, PromptKind.TOKENS, seed=seed)
    offsets = arrival_offsets(rate, Arrival.POISSON, seed)
    made = [
        TracedRequest(at, len(spec.prompt), spec.output_len)
        for spec, at in zip(islice(requests(workload), number), offsets, strict=False)
    ]
    return Trace(name, tuple(made))


def merged(name: str, traces: Sequence[Trace]) -> Trace:
    """All of them at once."""
    everything = sorted((r for trace in traces for r in trace.requests), key=lambda r: r.at)
    return Trace(name, tuple(everything))


def unloaded(setup: Setup, trace: Trace) -> Slo:
    """Limits for a trace: multiples of the median request's times when it is alone."""
    alone = replace(setup, split=Split(prefill=1, decode=1))
    records = simulate(alone, scale_rate(trace, 0.01 / (trace.rate or 1.0))).records
    ttft = summarize(r.ttft for r in records if r.ttft is not None).p50
    tpot = summarize(r.tpot for r in records if r.tpot is not None).p50
    return Slo(TTFT_TIMES * ttft, TPOT_TIMES * tpot)


def bare(model: LatencyModel) -> str:
    """The formulas in milliseconds."""
    a, b, c = (1e3 * value for value in model.prefill)
    d, e, f = (1e3 * value for value in model.decode)
    return (
        f"prefill {a:.3g} + {b:.3g} n + {c:.3g} n², "
        f"decode {d:.3g} + {e:.3g} context + {f:.3g} batch, in ms"
    )
