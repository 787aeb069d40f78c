"""Asks a running, idle fleet for what `tuner.overheads` needs: about a minute of requests.

alone      prompts of several lengths, one after the other
in a row   prompts of one step each, sent at once: first tokens come at the pace of the node
streams    so many short prompts at once: while all decode, their tokens come at its pace
together   prompts, one after the other, while streams run
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from random import Random
from statistics import median

import aiohttp

from tuner.client import Target, base_url, make_session, resolve_model, send
from tuner.fleet_check import check_fleet
from tuner.overheads import Alone, Probes, Streams
from tuner.record import RequestRecord
from tuner.workload import RequestSpec
from wire.errors import ConfigError

LENGTHS = (32, 64, 128, 256, 512)
REPEATS = 5
ROUNDS = 3  # of what takes longer: in between, a machine may become quiet
ALONE_OUTPUT = 8
BURST = 4
BATCHES = (1, 2, 4, 8, 16)
SHORT = 16  # tokens of a stream's prompt
STREAM_OUTPUT = 32
TOGETHER_BATCH = 4
PROMPTS = 2  # beside streams, in a round
TOGETHER_MARGIN = 3.0  # how much longer than alone prompts may take while streams run
MIN_STEP_S = 1e-4
Tell = Callable[[str], None]


@dataclass(slots=True)
class Prober:
    """One fleet that does nothing else."""

    session: aiohttp.ClientSession
    target: Target
    chunk: int  # the nodes' token budget per step
    max_model_len: int
    _random: Random = field(default_factory=Random)  # each run asks what no cache knows yet
    _numbers: Iterator[int] = field(default_factory=count)

    async def run(self, tell: Tell) -> Probes:
        """Everything, in order."""
        await self._ask(self.chunk, 2)
        await self._together(SHORT, STREAM_OUTPUT, max(BATCHES))  # warm
        tell("a request alone")
        alone = [await self._alone(length) for _ in range(REPEATS) for length in self._lengths()]
        tell("prompts that wait for each other")
        gaps = [gap for _ in range(ROUNDS) for gap in await self._in_a_row()]
        tell("streams that decode together")
        tried = [await self._streams(batch) for _ in range(ROUNDS) for batch in BATCHES]
        streams = [found for found in tried if found is not None]
        tell("prompts while streams decode")
        if not streams:
            raise ConfigError(f"{self.target.url}: no stream was seen to decode; is it busy?")
        near = min((abs(found.batch - TOGETHER_BATCH), found.batch) for found in streams)[1]
        step_s = median(found.step_s for found in streams if found.batch == near)
        slower = await self._both(step_s)
        return Probes(alone, gaps, self.chunk, streams, *slower)

    def _lengths(self) -> list[int]:
        return [n for n in LENGTHS if n + ALONE_OUTPUT < self.max_model_len]

    async def _ask(self, num_tokens: int, output: int) -> RequestRecord:
        """One request with a prompt that no cache knows; raises ConfigError if it fails."""
        prompt = tuple(self._random.randrange(10, 1000) for _ in range(num_tokens))
        spec = RequestSpec(next(self._numbers), prompt, output)
        now = time.perf_counter
        record = await send(self.session, self.target, spec, now(), now)
        if record.error is not None:
            raise ConfigError(f"{self.target.url}: {record.error}: {record.message}")
        if record.ttft is None:
            raise ConfigError(f"{self.target.url}: an answer without text tells no times")
        return record

    async def _together(self, num_tokens: int, output: int, number: int) -> list[RequestRecord]:
        return await asyncio.gather(*(self._ask(num_tokens, output) for _ in range(number)))

    async def _alone(self, num_tokens: int) -> Alone:
        record = await self._ask(num_tokens, ALONE_OUTPUT)
        assert record.ttft is not None
        return Alone(num_tokens, record.ttft, record.itls[0] if record.itls else 0.0)

    async def _in_a_row(self) -> list[float]:
        records = await self._together(self.chunk, 2, BURST)
        firsts = sorted(record.chunk_times[0] for record in records)
        return [after - before for before, after in pairwise(firsts)]

    async def _streams(self, batch: int) -> Streams | None:
        """None where they were never all at it: one alone always is."""
        records = await self._together(SHORT, STREAM_OUTPUT, batch)
        begin = max(record.chunk_times[1] for record in records)
        end = min(record.chunk_times[-1] for record in records)
        step_s = step_between(records, [(begin, end)])
        if not step_s:
            return None
        return Streams(batch, batch * (SHORT + STREAM_OUTPUT // 2), step_s)

    async def _both(self, step_s: float) -> tuple[float, float]:
        """How many times as long prefills and decode steps take while both happen.

        Prompts alone and prompts beside streams take turns; the medians are compared.
        """
        alone: list[float] = []
        beside: list[float] = []
        steps: list[float] = []
        for _ in range(ROUNDS):
            alone += [(await self._ask(self.chunk, 1)).ttft or 0.0 for _ in range(PROMPTS)]
            ttfts, busy_s = await self._beside(step_s, median(alone))
            beside += ttfts
            steps += [busy_s] if busy_s else []
        prefill = median(beside) / median(alone) if beside else 1.0
        return prefill, median(steps) / step_s if steps else 1.0

    async def _beside(self, step_s: float, alone_s: float) -> tuple[list[float], float]:
        """TTFTs of prompts while streams run, and these streams' seconds per step meanwhile."""
        most = self.max_model_len - SHORT - 1
        steps_alone = PROMPTS * alone_s / max(step_s, MIN_STEP_S)
        output = min(most, int(TOGETHER_MARGIN * steps_alone) + STREAM_OUTPUT)
        streams = asyncio.create_task(self._together(SHORT, output, TOGETHER_BATCH))
        await asyncio.sleep(8 * step_s)
        prompts = [await self._ask(self.chunk, 1) for _ in range(PROMPTS)]
        records = await streams
        busy_s = step_between(records, [(p.start, p.chunk_times[0]) for p in prompts])
        still_on = min(record.chunk_times[-1] for record in records)
        return [p.ttft for p in prompts if p.ttft and p.chunk_times[0] <= still_on], busy_s


def gaps_between(
    records: Sequence[RequestRecord], spans: Sequence[tuple[float, float]]
) -> list[float]:
    """Times between neighbouring chunks that lie in one of the spans as a whole."""
    return [
        after - before
        for record in records
        for before, after in pairwise(record.chunk_times)
        if any(begin <= before and after <= end for begin, end in spans)
    ]


def step_between(records: Sequence[RequestRecord], spans: Sequence[tuple[float, float]]) -> float:
    """Mean seconds per token in these spans; 0 where there is none.

    Not the median gap: a client that has been away reads several chunks at once. Tokens without a
    text of their own come with the next one; of those there are as many in a span as anywhere.
    """
    gaps = gaps_between(records, spans)
    chunks = sum(len(record.chunk_times) - 1 for record in records)
    tokens = sum(record.output_tokens - 1 for record in records)
    return sum(gaps) / len(gaps) * min(1.0, chunks / tokens) if gaps and tokens else 0.0


@asynccontextmanager
async def _measurable(url: str, model: str) -> AsyncIterator[tuple[aiohttp.ClientSession, Target]]:
    """A session with the fleet behind `url`. Raises ConfigError if the probes are not for it."""
    target = Target(base_url(url), model, ignore_eos=True)
    async with make_session(target) as session:
        target = await resolve_model(session, target)
        await check_fleet(session, target.url)
        yield session, target


async def check(url: str, model: str) -> None:
    """Raise ConfigError where `probe` would, before anything is measured in vain."""
    async with _measurable(url, model):
        pass


async def probe(url: str, model: str, chunk: int, max_model_len: int, tell: Tell) -> Probes:
    """Measure the fleet behind `url`, which must serve `model`. Raises ConfigError."""
    async with _measurable(url, model) as (session, target):
        return await Prober(session, target, chunk, max_model_len).run(tell)
