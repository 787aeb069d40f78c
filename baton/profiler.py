"""Steps of one engine, and what nodes do with the blocks of a transfer, timed on this machine.

Steps run through the product's own engine, without a network: prompts of many lengths behind cached
prefixes of many lengths, then decodes of many batches at many contexts. Of a transfer, what both
nodes do with a block is measured: the digest here; copy, digest there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from random import Random

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from kvtransfer.digest import UnitSealer
from kvtransfer.units import units_of
from tuner.latency import Sample, StepWork, decode_sample, prefill_sample, transfer_sample
from tuner.quiet import spread_of, undisturbed
from wire.layout import KVLayout
from wire.types import AttemptId, SamplingParams

Stopwatch = Callable[[], float]
BLOCK_SIZE = 16
MAX_KV_BYTES = 1 << 30
CHUNKS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PREFIXES = (0, 256, 1024, 4096)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024, 4096)
REPEATS = 5
TRANSFER_BLOCKS = (1, 4, 16, 64)
_DECODED = 4 * REPEATS * len(BATCHES)  # tokens that a request may answer at most
LEAST_MODEL_LEN = 2 * CONTEXTS[0] + _DECODED


def stopwatch_for(device: str, threads: int) -> Stopwatch:
    """Processor time where one thread computes all: who else runs, or steals, is not in it."""
    return time.thread_time if device == "cpu" and threads == 1 else time.perf_counter


class Profiler:
    """One engine after the other on one loaded model. `repeats` are the seconds of each case."""

    def __init__(
        self,
        loaded: LoadedModel,
        layout: KVLayout,
        stopwatch: Stopwatch,
        clock: Stopwatch = time.perf_counter,
    ) -> None:
        self.repeats: list[list[float]] = []
        self._stopwatch = stopwatch
        self._took_s = self._passed_s = 0.0  # of all steps
        self._loaded = loaded
        self._layout = layout
        self._clock = clock
        self._num_blocks = max(
            2 * layout.num_blocks(loaded.max_model_len), MAX_KV_BYTES // layout.block_bytes
        )
        self._store = KVStore(layout, self._num_blocks)
        self._runner = ModelRunner(loaded, self._store)
        self._random = Random(0)
        self._numbers = count()

    def _engine(self, *, prefix_caching: bool) -> Engine:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=self._num_blocks,
            max_model_len=self._loaded.max_model_len,
            max_num_seqs=max(BATCHES),
            max_num_batched_tokens=self._loaded.max_model_len,
            enable_prefix_caching=prefix_caching,
        )
        return Engine(
            config,
            self._runner,
            epoch=1,
            model_fingerprint=self._loaded.fingerprint,
            eos_token_ids=frozenset(),
            ops=self._loaded.ops,
        )

    def _request(self, tokens: list[int], max_tokens: int) -> Request:
        return Request(
            request_id=str(next(self._numbers)),
            tokens=tokens,
            num_prompt_tokens=len(tokens),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            max_num_tokens=len(tokens) + max_tokens,
        )

    def _tokens(self, number: int) -> list[int]:
        return [self._random.randrange(self._loaded.vocab_size) for _ in range(number)]

    def _timed_step(self, engine: Engine) -> float:
        begin, start = self._clock(), self._stopwatch()
        engine.step()
        took = self._stopwatch() - start
        self._took_s, self._passed_s = self._took_s + took, self._passed_s + self._clock() - begin
        return took

    def spread(self) -> dict[str, float]:
        """How far repeats are apart, and for what part of a step the processor was elsewhere."""
        elsewhere = 1 - self._took_s / self._passed_s
        return {"engine": spread_of(self.repeats), "processor elsewhere": max(0.0, elsewhere)}

    # ------------------------------------------------------------ prefill

    def prefills(self, seconds: float) -> list[Sample]:
        """Every case once, the cheapest first, then all again until the time is over."""
        end = self._clock() + seconds
        engine = self._engine(prefix_caching=True)
        prefixes = {n: self._tokens(n) for n in PREFIXES if n < self._loaded.max_model_len}
        for tokens in prefixes.values():
            if tokens:
                self._prefill(engine, tokens)
        self._prefill(engine, self._tokens(BLOCK_SIZE))  # warms up
        took: dict[tuple[int, int], list[float]] = defaultdict(list)
        for turn in range(REPEATS):
            for prefix, chunk in self._prefill_cases(prefixes):
                if turn and self._clock() > end:
                    break
                tokens = prefixes[prefix] + self._tokens(chunk)
                took[prefix, chunk].append(self._prefill(engine, tokens))
        self.repeats += took.values()
        return [
            prefill_sample(StepWork(n, (prefix + n) ** 2 - prefix**2), undisturbed(seconds))
            for (prefix, n), seconds in took.items()
        ]

    def _prefill_cases(self, prefixes: dict[int, list[int]]) -> Iterator[tuple[int, int]]:
        for chunk in CHUNKS:
            for prefix in prefixes:
                if prefix + chunk < self._loaded.max_model_len:
                    yield prefix, chunk

    def _prefill(self, engine: Engine, tokens: list[int]) -> float:
        """One step, after which the request is over; its blocks stay findable."""
        engine.add(self._request(tokens, 1))
        return self._timed_step(engine)

    # ------------------------------------------------------------ decode

    def decodes(self, seconds: float) -> list[Sample]:
        """Contexts from the shortest, each with its share of the time that is left.

        Of one context alone nobody could tell what reading it takes.
        """
        end = self._clock() + seconds
        longest = self._loaded.max_model_len - _DECODED
        contexts = sorted({min(context, longest) for context in CONTEXTS})
        samples: list[Sample] = []
        for number, context in enumerate(contexts):
            now = self._clock()
            share = max(0.0, end - now) / (len(contexts) - number)
            samples += self._decodes_at(context, now, now + share)
        return samples

    def _decodes_at(self, context: int, start: float, end: float) -> list[Sample]:
        """Batches grow, from one on; each is timed for a few steps.

        One takes about as long as all before it: that many requests have their prompts to compute.
        """
        engine = self._engine(prefix_caching=False)
        running: list[Request] = []
        samples: list[Sample] = []
        for batch in BATCHES:
            if batch * self._layout.num_blocks(context + _DECODED) > self._num_blocks:
                break
            while len(running) < batch:
                running.append(self._request(self._tokens(context), _DECODED))
                engine.add(running[-1])
                engine.step()
            steps = [self._timed_step(engine) for _ in range(REPEATS)]
            tokens = sum(request.num_tokens for request in running) - batch * (REPEATS // 2 + 1)
            work = StepWork(decode_batch=batch, decode_context=tokens)
            self.repeats.append(steps)
            samples.append(decode_sample(work, undisturbed(steps)))
            now = self._clock()
            if now + (now - start) > end:
                break
        return samples


def transfers(layout: KVLayout, link_gbit_s: float | None, link_latency_ms: float) -> list[Sample]:
    """Digest, copy and digest of some blocks, and the link between."""
    samples = []
    size = layout.block_bytes
    for num_blocks in TRANSFER_BLOCKS:
        num_tokens = num_blocks * layout.block_size
        sealer = UnitSealer(
            key=bytes(16),
            id=AttemptId("profile", 1),
            lease=1,
            tokens=range(num_tokens),
            block_size=layout.block_size,
            model_fingerprint="profile",
            cache_salt="",
        )
        source, target = memoryview(bytearray(num_blocks * size)), memoryview(bytearray(size))
        units = units_of(num_tokens, 0, layout)
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for unit in units:
                block = source[unit.block * size : (unit.block + 1) * size]
                sealer.digest(unit, block)
                sealer.seal(unit, sealer.copy(block, target))
            seconds.append(time.perf_counter() - start)
        link = link_latency_ms / 1e3
        link += num_blocks * size * 8 / (link_gbit_s * 1e9) if link_gbit_s else 0.0
        samples.append(transfer_sample(num_blocks * size, undisturbed(seconds) + link))
    return samples
