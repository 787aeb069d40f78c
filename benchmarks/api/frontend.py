"""What a chat costs between its body and the nodes, beside the tokenizer's own work.

The router's real handler, real stub nodes whose prefix caches know the half of the prompt, in one
loop; the time ends where the first message for a node is handed over. The tokenizer's share is
measured next to it in every round, on the text that the template gave.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from aiohttp import StreamReader, web
from aiohttp.test_utils import make_mocked_request
from tokenizers import Tokenizer

from baton.bundled_model import DEFAULT_MODEL
from benchmarks.stamps import stamping
from benchmarks.stub_node import StubNode, model_info
from benchmarks.stub_pair import StubPair
from router.api_chat import parse_chat
from router.config import RouterConfig
from router.server import RouterServer
from wire.fleet_messages import CacheEvents, TokenizerFiles
from wire.messages import Message
from wire.prefix import block_hashes, root_hash
from wire.types import NodeId

NUM_TOKENS = 1000
VOCAB_SIZE = 4096
MODEL = model_info(VOCAB_SIZE)
SENTENCE = "Please write a function that counts the words of a text, and explain its lines. "


def measure_frontend(folder: Path, quick: bool = False, rounds: int = 300) -> dict[str, float]:
    return asyncio.run(_measure(min(rounds, 50) if quick else rounds))


async def _measure(rounds: int) -> dict[str, float]:
    server = RouterServer(RouterConfig(port=0, control_port=0))
    await server.start()
    pair = StubPair(server.control.url, stamping, MODEL, _tokenizer_files(), step_s=0.05)
    try:
        await pair.ready()
        while not server.control.ready:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await _measure_rounds(server, pair, rounds)
    finally:
        await pair.close()
        await server.close()


async def _measure_rounds(server: RouterServer, pair: StubPair, rounds: int) -> dict[str, float]:
    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    body, prompt = await _chat(server)
    text = tokenizer.decode(prompt, skip_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False).ids == prompt
    await _fill_caches(server, pair, prompt)
    wall: list[float] = []
    cpu: list[float] = []
    encoding: list[float] = []
    for _ in range(rounds):
        encoded = _Stopwatch()
        tokenizer.encode_batch([text], add_special_tokens=False)
        encoded.stop()
        asked = await _until_first_message(server, body)
        encoding.append(encoded.wall)
        wall.append((asked.wall - encoded.wall) * 1e3)
        cpu.append((asked.cpu - encoded.cpu) * 1e3)
    print(
        f"frontend  {statistics.median(wall):.2f} ms beyond the tokenizer's "
        f"{statistics.median(encoding) * 1e3:.2f} ms ({len(prompt):,} tokens); 10th and 90th "
        f"percentile {sorted(wall)[rounds // 10]:.2f} and {sorted(wall)[rounds * 9 // 10]:.2f} ms; "
        f"processor time {statistics.median(cpu):.2f} ms"
    )
    return {
        "frontend_ms_beyond_tokenizer": round(statistics.median(wall), 3),
        "frontend_cpu_ms_beyond_tokenizer": round(statistics.median(cpu), 3),
    }


class _Stopwatch:
    """Seconds on the clock and of this process's threads, from its making to `stop`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter(), time.process_time()
        self.wall = self.cpu = 0.0

    def stop(self) -> None:
        self.wall = time.perf_counter() - self._begin[0]
        self.cpu = time.process_time() - self._begin[1]


def _tokenizer_files() -> TokenizerFiles:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    paths = (DEFAULT_MODEL / name for name in names)
    return TokenizerFiles(*(path.read_bytes() if path.exists() else b"" for path in paths))


async def _chat(server: RouterServer) -> tuple[bytes, list[int]]:
    """A conversation of about 1,000 tokens in several turns, and its prompt."""
    tokenizer = server.control.tokenizer
    assert tokenizer is not None
    messages: list[dict[str, Any]] = []
    tokens: list[int] = []
    while len(tokens) < NUM_TOKENS:
        role = ("user", "assistant")[len(messages) % 2]
        messages.append({"role": role, "content": f"{len(messages)}. {SENTENCE * 2}"})
        body = json.dumps({"model": MODEL.name, "messages": messages, "max_tokens": 1}).encode()
        tokens = await tokenizer.encode_chat(parse_chat(body).messages)
    return body, tokens


async def _fill_caches(server: RouterServer, pair: StubPair, prompt: list[int]) -> None:
    """Both nodes say that they have the first half of the prompt."""
    root = root_hash(MODEL.fingerprint, "")
    known = block_hashes(prompt[: len(prompt) // 2], 16, root)
    nodes: list[StubNode] = [pair.prefill, pair.decode]
    for node in nodes:
        node.send(CacheEvents(1, tuple(known)))
    while not all(len(node.cache) for node in server.control.fleet):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def _until_first_message(server: RouterServer, body: bytes) -> _Stopwatch:
    """From the handler's call to the first message for a node."""
    deliveries = server.control.requests._deliveries
    send = deliveries._send
    request = _request(body)
    watch = _Stopwatch()

    def stop(to: NodeId, message: Message) -> None:
        watch.stop()
        deliveries._send = send
        send(to, message)

    deliveries._send = stop
    answer = await server.serving.chat(request)
    assert answer.status == 200
    return watch


def _request(body: bytes) -> web.Request:
    payload = StreamReader(Mock(_reading_paused=False), 1 << 20, loop=asyncio.get_running_loop())
    payload.feed_data(body)
    payload.feed_eof()
    return make_mocked_request("POST", "/v1/chat/completions", payload=payload)
