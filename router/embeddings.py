"""POST /v1/embeddings: prompts that end with a vector instead of tokens.

A prefill node computes each, and no decode node is asked. Up to WINDOW of a request's inputs are on
their way at a time, so that one request of thousands leaves room in the queue for others.
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from array import array
from base64 import b64encode
from collections.abc import Iterator
from math import fsum, sqrt
from typing import Any

from aiohttp import web

from router.api_embeddings import EmbeddingBody, parse_embedding
from router.asked import Served
from router.choice import Choice, Listener
from router.errors import ApiError, bad_request, context_too_long
from router.params import check_tokens
from router.requests import Requests
from router.serving import Serving
from router.work import Prompt, Work
from telemetry.timeline import Timeline
from wire.types import SamplingParams

WINDOW = 64
_SAMPLING = SamplingParams(max_tokens=1)  # room for one token; none is sampled


class EmbeddingPages:
    """Answers with what the prefill nodes pooled."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def embeddings(self, request: web.Request) -> web.Response:
        """POST /v1/embeddings"""
        serving = self._serving
        timeline = Timeline(serving.now())
        body = parse_embedding(await serving.read(request))
        timeline.body_read(serving.now())
        served = serving.served(body.model)
        prompts = [await _tokens(item, body, served) for item in body.input]
        timeline.tokenized(serving.now())
        num_tokens = sum(map(len, prompts))
        with serving.answering(request, num_tokens):
            serving.check_room(min(len(prompts), WINDOW), served)
            gathered = Gathered(serving.requests)
            choices = self._choices(prompts, body, served, timeline, gathered)
            try:
                await gathered.run(choices)
            finally:
                gathered.cancel()
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        answer = await asyncio.to_thread(_answer, choices, body, served.name, usage)
        return web.Response(body=answer, content_type="application/json", charset="utf-8")

    def _choices(
        self,
        prompts: list[list[int]],
        body: EmbeddingBody,
        served: Served,
        timeline: Timeline,
        listener: Listener,
    ) -> list[Choice]:
        id, priority = uuid.uuid4().hex, body.priority or 0
        choices = []
        for index, tokens in enumerate(prompts):
            prompt = Prompt(tuple(tokens), body.cache_salt or "")
            work = Work(f"{id}-{index}", prompt, _SAMPLING, self._serving.pooling)
            choices.append(
                self._serving.choices.plain(
                    work, served, timeline, listener, index=index, priority=priority
                )
            )
        return choices


async def _tokens(item: str | list[int], body: EmbeddingBody, served: Served) -> list[int]:
    """One input. Raises ApiError."""
    if isinstance(item, str):
        add_special_tokens = body.add_special_tokens is not False
        item = (await served.tokenizer.encode(item, add_special_tokens)).ids
    if not item:
        raise bad_request("The input is empty.", "input")
    if len(item) >= served.info.max_model_len:
        raise context_too_long(served.info.max_model_len, len(item), 0, "input")
    check_tokens(item, served.info, "input")
    return item


class Gathered:
    """Submits choices, a window of them at a time, and waits for the last."""

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._choices: list[Choice] = []
        self._left: Iterator[Choice] = iter(())
        self._num_done = 0
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, choices: list[Choice]) -> None:
        """Raises ApiError."""
        self._choices, self._left = choices, iter(choices)
        for _ in range(WINDOW):
            self._submit_next()
        await self._done

    def _submit_next(self) -> None:
        choice = next(self._left, None)
        if choice is not None:
            self._requests.submit(choice)

    def produced(self, choice: Choice, text: str) -> None:
        self._num_done += 1
        if self._num_done == len(self._choices):
            if not self._done.done():
                self._done.set_result(None)
        else:
            self._submit_next()

    def failed(self, error: ApiError) -> None:
        if not self._done.done():
            self._done.set_exception(error)
        self.cancel()

    def cancel(self) -> None:
        """The client has gone, or one input has failed: end the others."""
        self._left = iter(())
        for choice in self._choices:
            self._requests.cancel(choice)


def _answer(choices: list[Choice], body: EmbeddingBody, model: str, usage: dict[str, int]) -> bytes:
    """Raises ApiError."""
    as_base64 = body.encoding_format == "base64"
    data = [
        {
            "object": "embedding",
            "index": choice.index,
            "embedding": embedding_of(choice.embedding or b"", body.dimensions, as_base64),
        }
        for choice in choices
    ]
    whole: dict[str, Any] = {"object": "list", "data": data, "model": model, "usage": usage}
    return json.dumps(whole).encode()


def embedding_of(vector: bytes, dimensions: int | None, as_base64: bool) -> str | list[float]:
    """A node's vector as a client wants it: its first `dimensions`, of length 1 again.

    Raises ApiError for more dimensions than there are.
    """
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    if dimensions is not None:
        if dimensions > len(numbers):
            text = f"`dimensions` is at most {len(numbers)}, the size of the model's embeddings."
            raise bad_request(text, "dimensions")
        first = numbers[:dimensions]
        length = sqrt(fsum(number * number for number in first)) or 1.0
        numbers = array("f", [number / length for number in first])
    if not as_base64:
        return numbers.tolist()
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(numbers.tobytes()).decode()
