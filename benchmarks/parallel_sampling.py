"""What `n = 8` costs beside one choice: KV blocks of the decode node, and time of the prefill node.

    python -m benchmarks.parallel_sampling [--quick]

A router, a prefill and a decode node as real processes, the 88 M random model, 1,000-token prompts
that nobody has seen before. Blocks are the most that were held at one time, each choice's output
included; eight separate requests are eight times what one held. Prefill time is the sum of the
prefill node's steps. Pairs of one request with one choice and one with eight are interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from benchmarks.bench_serve import make_random_model
from benchmarks.serve.processes import BATON, free_port, running

PROMPT_TOKENS = 1000
OUTPUT_TOKENS = 24  # all choices decode at one time, and each takes one block for it
N = 8
START_TIMEOUT_S = 180.0
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Urls:
    """Where the processes answer."""

    router: str
    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request."""

    blocks: float  # most that the decode node held for running requests
    prefill_s: float  # the prefill node's steps
    first_tokens_s: float  # until every choice had its first token


@contextmanager
def fleet(folder: Path, model: Path) -> Iterator[Urls]:
    """One router and one node of each role, a compute thread each."""
    port, control = free_port(), free_port()
    with ExitStack() as stack:
        ports = ["--port", str(port), "--control-port", str(control), "--handoff", "always"]
        router = stack.enter_context(running([BATON, "router", *ports], folder / "router.log"))
        router.wait_for(r"^baton router ready", START_TIMEOUT_S)
        nodes = {}
        for role in ("prefill", "decode"):
            flags = ["--router", f"tcp://127.0.0.1:{control}", "--threads", "1"]
            command = [BATON, role, model, *flags]
            process = stack.enter_context(running(command, folder / f"{role}.log"))
            ready = process.wait_for(rf"^baton {role} ready .*http=(\S+)", START_TIMEOUT_S)
            nodes[role] = ready[1]
        yield Urls(f"http://127.0.0.1:{port}", nodes["prefill"], nodes["decode"])


class Client:
    """Asks, and watches the nodes meanwhile."""

    def __init__(self, session: aiohttp.ClientSession, urls: Urls) -> None:
        self._session = session
        self._urls = urls

    async def _metric(self, url: str, name: str) -> float:
        async with self._session.get(f"{url}/metrics") as response:
            text = await response.text()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, f"{url} has no {name}"
        return float(found[1])

    async def ready(self) -> None:
        while True:
            async with self._session.get(f"{self._urls.router}/ready") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.1)

    async def cost(self, prompt: list[int], n: int) -> Cost:
        """Of one request with `n` choices."""
        before = await self._metric(self._urls.prefill, "baton_step_seconds_sum")
        began = time.perf_counter()
        request = asyncio.create_task(self._first_tokens(prompt, n))
        most = 0.0
        while not request.done():
            held = await self._metric(self._urls.decode, 'baton_blocks{state="running"}')
            most = max(most, held)
            await asyncio.sleep(0.01)
        after = await self._metric(self._urls.prefill, "baton_step_seconds_sum")
        return Cost(most, after - before, await request - began)

    async def _first_tokens(self, prompt: list[int], n: int) -> float:
        """Read the whole stream; when the last choice's first token came."""
        body = {
            "prompt": prompt,
            "n": n,
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        seen: dict[int, float] = {}
        url = f"{self._urls.router}/v1/completions"
        async with self._session.post(url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        seen.setdefault(choice["index"], time.perf_counter())
        assert len(seen) == n, f"{len(seen)} of {n} choices were answered"
        return max(seen.values())


async def measure_pairs(urls: Urls, num_pairs: int) -> list[tuple[Cost, Cost]]:
    """One choice and `N` choices, in turns, after one of each that warms up."""
    random_ids = random.Random(0)
    async with aiohttp.ClientSession() as session:
        client = Client(session, urls)
        await client.ready()

        async def cost(n: int) -> Cost:
            prompt = [random_ids.randrange(10, 1000) for _ in range(PROMPT_TOKENS)]
            return await client.cost(prompt, n)

        return [(await cost(1), await cost(N)) for _ in range(num_pairs + 1)][1:]


def measure_parallel_sampling(folder: Path, quick: bool) -> Figures:
    """The figures of `n = 8`."""
    model = folder / "m88"
    make_random_model(model)
    with fleet(folder, model) as urls:
        pairs = asyncio.run(measure_pairs(urls, 2 if quick else 7))
    median = statistics.median
    share = median(several.blocks / (N * one.blocks) for one, several in pairs)
    prefill = median(several.prefill_s / one.prefill_s for one, several in pairs)
    first = median(several.first_tokens_s / one.first_tokens_s for one, several in pairs)
    print(
        f"n = {N}     {median(several.blocks for _, several in pairs):.0f} blocks, "
        f"{median(one.blocks for one, _ in pairs):.0f} for one choice; "
        f"prefill {prefill:.2f}, all first tokens after {first:.2f} times one choice's"
    )
    return {
        "n8_block_share": round(share, 3),
        "n8_prefill_ratio": round(prefill, 3),
        "n8_first_tokens_ratio": round(first, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two pairs instead of seven")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure_parallel_sampling(Path(folder), args.quick)))


if __name__ == "__main__":
    main()
