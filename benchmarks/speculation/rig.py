"""One model, requests on it, and their decode time with and without drafts."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from pathlib import Path

from engine.config import EngineConfig
from engine.drafting.control import Controller
from engine.drafting.draft_model import DraftModel
from engine.drafting.drafter import Ask, Drafter
from engine.drafting.ngram import NgramDrafter
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from wire.types import SamplingParams

BLOCK_SIZE = 16
MAX_LEN = 2048
NUM_BLOCKS = 16 * 1280 // BLOCK_SIZE  # all of 16 requests run, whatever they come to
_IDS = count()  # no drafter meets a request twice


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that decode together."""

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    temperature: float = 0.0

    def requests(self) -> list[Request]:
        return [
            new_request(number, prompt, self.max_tokens, self.temperature)
            for number, prompt in enumerate(self.prompts)
        ]


def new_request(number: int, prompt: Sequence[int], max_tokens: int, temperature: float) -> Request:
    return Request(
        request_id=f"{next(_IDS)}/{number}",
        tokens=list(prompt),
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(
            seed=number, max_tokens=max_tokens, temperature=temperature, ignore_eos=True
        ),
        max_num_tokens=len(prompt) + max_tokens,
    )


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests without end: always `num_seats` of them run, each that ends makes room for the next.

    What counts is the time of `num_tokens` tokens after the first `num_warm`. Lengths differ, so
    that ends and beginnings are spread over it as they are on a node.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int  # of the longest; the shortest has a third
    temperature: float
    num_seats: int
    num_warm: int
    num_tokens: int

    def requests(self) -> Iterator[Request]:
        rng = random.Random(0)
        for number, prompt in enumerate(cycle(self.prompts)):
            length = rng.randint(self.max_tokens // 3, self.max_tokens)
            yield new_request(number, [*prompt, 10 + number % 100], length, self.temperature)


@dataclass(slots=True)
class Run:
    """What a job took once its prompts were computed."""

    seconds: float = 0.0
    num_tokens: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_of: list[tuple[int, int]] = field(default_factory=list)
    draft_s: list[float] = field(default_factory=list)  # per step
    step_s: list[float] = field(default_factory=list)  # without the drafting
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


class Rig:
    """A loaded model and a store; the engines made of them take turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: LoadedModel = load_model(folder)
        self._store = KVStore(self.loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS)

    def speculation(self, drafter: Drafter, most: int, *, adaptive: bool = True) -> Speculation:
        controller = Controller(most, drafter.cost_per_token, adaptive)
        return Speculation(
            drafter, controller, vocab_size=self.loaded.vocab_size, clock=time.perf_counter
        )

    def draft_model(self, folder: Path) -> DraftModel:
        draft = load_model(folder)
        store = KVStore(draft.kv_layout(BLOCK_SIZE), NUM_BLOCKS)
        sampler = Sampler(frozenset(draft.eos_token_ids), draft.ops)
        return DraftModel(
            ModelRunner(draft, store),
            sampler,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            max_model_len=draft.max_model_len,
        )

    def run(self, job: Job | Stream, speculation: Speculation | None = None) -> Run:
        """A batch from its first decode step to its end, or a stream in its middle."""
        if isinstance(job, Stream):
            return self._run_stream(job, speculation)
        engine = self._engine(speculation)
        requests = job.requests()
        for request in requests:
            engine.add(request)
        while any(request.num_output_tokens == 0 for request in requests):
            engine.step()
        run = Run()
        before = sum(request.num_output_tokens for request in requests)
        while engine.has_work():
            self._step(engine, run)
        run.num_tokens = sum(request.num_output_tokens for request in requests) - before
        run.outputs = [request.output_tokens for request in requests]
        return run

    def _run_stream(self, stream: Stream, speculation: Speculation | None) -> Run:
        engine, coming = self._engine(speculation), stream.requests()
        begun: list[Request] = []

        def run_until(num_tokens: int) -> Run:
            run = Run()
            while run.num_tokens < num_tokens:
                over = sum(request.finish_reason is not None for request in begun)
                for request in islice(coming, stream.num_seats + over - len(begun)):
                    begun.append(request)
                    engine.add(request)
                run.num_tokens += self._step(engine, run)
            return run

        run_until(stream.num_warm)
        run = run_until(stream.num_tokens)
        run.outputs = [r.output_tokens for r in begun]
        return run

    def _step(self, engine: Engine, run: Run) -> int:
        """How many tokens came of it."""
        start = time.perf_counter()
        result = engine.step()
        seconds = time.perf_counter() - start
        assert result is not None
        run.seconds += seconds
        counts = result.speculation
        assert counts is None or not counts.failure, counts
        draft_s = 0.0 if counts is None else counts.draft_s
        run.draft_s.append(draft_s)
        run.step_s.append(seconds - draft_s)
        if counts is not None:
            run.accepted_of += counts.drafts
            run.num_drafted += sum(drafted for drafted, _ in counts.drafts)
            run.num_accepted += sum(accepted for _, accepted in counts.drafts)
        return sum(len(progress.new_tokens) for progress in result.progress)

    def _engine(self, speculation: Speculation | None) -> Engine:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            max_model_len=MAX_LEN,
            max_num_seqs=16,
            max_num_batched_tokens=16 * 1024,
            enable_prefix_caching=False,
        )
        return Engine(
            config,
            ModelRunner(self.loaded, self._store),
            epoch=1,
            model_fingerprint="bench",
            eos_token_ids=frozenset(),
            ops=self.loaded.ops,
            speculation=speculation,
        )


class Oracle:
    """Drafts what comes, each token wrong with probability 1 - share: any model's best friend."""

    method = "oracle"
    cost_per_token = False

    def __init__(self, outputs: Sequence[Sequence[int]], share: float, vocab_size: int) -> None:
        self._outputs = outputs
        self._share = share
        self._vocab_size = vocab_size
        self._rng = random.Random(0)

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        return [self._draft(ask) for ask in asks]

    def _draft(self, ask: Ask) -> list[int]:
        start = ask.request.num_output_tokens
        number = int(ask.request.request_id.rpartition("/")[2])
        right = self._outputs[number][start : start + ask.num_tokens]
        return [t if self._rng.random() < self._share else self._wrong(t) for t in right]

    def _wrong(self, token: int) -> int:
        return (token + self._rng.randrange(1, self._vocab_size)) % self._vocab_size

    def accepted(self, request: Request, num_tokens: int) -> None:
        """It knows."""


def ngram() -> NgramDrafter:
    return NgramDrafter(2, 4)


def speedups(
    rig: Rig, jobs: Sequence[Job | Stream], speculation: Speculation, num_pairs: int
) -> tuple[list[float], list[Run]]:
    """Of pairs in turn, with drafts over without; the first pair warms up and does not count.

    The node's knowledge of costs and acceptance stays, as it does between requests.
    """
    ratios, runs = [], []
    for number, job in zip(range(num_pairs + 1), cycle(jobs), strict=False):
        plain, drafted = rig.run(job), rig.run(job, speculation)
        assert same_text(plain, drafted), "drafts changed the output"
        if number:
            ratios.append(drafted.rate / plain.rate)
            runs.append(drafted)
    return ratios, runs


def same_text(one: Run, other: Run) -> bool:
    """Whether the requests got the same tokens, as far as both of them came."""
    pairs = zip(one.outputs, other.outputs, strict=False)
    return all(a[: len(b)] == b[: len(a)] for a, b in pairs)


def median(numbers: Sequence[float]) -> float:
    return statistics.median(numbers)
