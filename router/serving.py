"""The main path of a client request: body, prompt tokens, choices, answer.

    handler ─▶ parse ─▶ tokenize ─▶ Generation.start ─▶ events or one answer

A handler is cancelled when its client disconnects; `cancel` in its `finally` frees both nodes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from router.api import ChatBody, CompletionBody, parse_chat, parse_completion
from router.choice import Choice, Listener
from router.choice_text import ChoiceText
from router.chunks import AnswerFormat, ChatFormat, CompletionFormat
from router.config import RouterConfig
from router.control import Control
from router.dispatch import Dispatch
from router.errors import ApiError, bad_request, context_too_long, model_not_found, unavailable
from router.generation import Collected, Streamed
from router.metrics import RouterMetrics
from router.params import GenerationParams, check_tokens, generation_params
from router.tokenizer import Tokenizer
from router.work import Prompt, Work
from telemetry import metrics as names
from telemetry.timeline import Timeline
from wire.messages import ModelInfo

STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else proxies collect events before they pass them on
}


@dataclass(frozen=True, slots=True)
class _Served:
    """The model that a request found when it arrived."""

    info: ModelInfo
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that was found valid, before any of its choices exists."""

    id: str
    prompts: list[list[int]]
    params: GenerationParams
    served: _Served
    arrived: float


class Serving:
    """Answers completions and chat."""

    def __init__(
        self,
        config: RouterConfig,
        control: Control,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._control = control
        self._metrics = metrics
        self._clock = clock
        self.closing = False

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that clients may use; the first one stands in answers."""
        model = self._control.fleet.model
        return self._config.served_model_name or (() if model is None else (model.name,))

    # ------------------------------------------------------------ handlers

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        arrived = self._clock()
        body = parse_completion(await self._read(request))
        served = self._served(body)
        params = generation_params(body, served.info)
        with self._metrics.tokenize.time():
            prompts = [await _tokens(prompt, served) for prompt in body.prompt]
        asked = _Asked(uuid.uuid4().hex, prompts, params, served, arrived)
        return await self._generate(request, asked, CompletionFormat)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        arrived = self._clock()
        body = parse_chat(await self._read(request))
        served = self._served(body)
        params = generation_params(body, served.info)
        with self._metrics.tokenize.time():
            prompt = await served.tokenizer.encode_chat(body.messages)
        if not prompt:
            raise bad_request("The chat template gives an empty prompt.", "messages")
        asked = _Asked(uuid.uuid4().hex, [prompt], params, served, arrived)
        return await self._generate(request, asked, ChatFormat)

    async def _read(self, request: web.Request) -> bytes:
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                return await request.read()
        except TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.") from error

    def _served(self, body: CompletionBody | ChatBody) -> _Served:
        """What serves this request. Raises ApiError."""
        if self.closing:
            raise unavailable("The server is shutting down.", "shutting_down")
        if body.model is not None and self.model_names and body.model not in self.model_names:
            raise model_not_found(body.model)
        model, tokenizer = self._control.fleet.model, self._control.tokenizer
        if model is None or tokenizer is None or not self._control.ready:
            raise unavailable("No node is ready to serve the model.", "no_nodes", 2.0)
        return _Served(model, tokenizer, self.model_names[0])

    # ------------------------------------------------------------ generation

    async def _generate(
        self,
        request: web.Request,
        asked: _Asked,
        make_format: type[CompletionFormat | ChatFormat],
    ) -> web.StreamResponse:
        params = asked.params
        self._check_room(asked)
        format = make_format(asked.id, asked.served.name, int(time.time()), params.include_usage)
        if params.stream:
            return await self._stream(request, asked, format)
        generation = Collected(
            self._control.requests, format, return_token_ids=params.return_token_ids
        )
        choices = self._choices(asked, generation)
        try:
            generation.start(choices, params.n)
            return web.json_response(await generation.answer())
        finally:
            generation.cancel()

    async def _stream(
        self, request: web.Request, asked: _Asked, format: AnswerFormat
    ) -> web.StreamResponse:
        params = asked.params
        generation = Streamed(
            self._control.requests,
            format,
            include_usage=params.include_usage,
            continuous_usage=params.continuous_usage,
            max_buffered=self._config.stream_buffer_bytes,
            on_overflow=lambda: self._give_up(request),
        )
        choices = self._choices(asked, generation)
        try:
            generation.start(choices, params.n)
            return await self._write_events(request, generation)
        finally:
            generation.cancel()

    async def _write_events(self, request: web.Request, generation: Streamed) -> web.StreamResponse:
        """The status is sent with the first event, so that an earlier error has its own."""
        events = await generation.next_events()
        response = web.StreamResponse(headers=STREAM_HEADERS)
        with self._metrics.streams.track_inprogress():
            await response.prepare(request)
            while events:
                await response.write(events)
                events = await generation.next_events()
            await response.write_eof()
        return response

    def _give_up(self, request: web.Request) -> None:
        """The client does not read: close its connection, which cancels the handler."""
        self._metrics.slow_clients.inc()
        if request.transport is not None:
            request.transport.abort()

    def _check_room(self, asked: _Asked) -> None:
        try:
            self._control.requests.check_room(len(asked.prompts) * asked.params.n)
        except ApiError:
            self._metrics.for_model(asked.served.info.name).count(names.ADMISSION_REJECTIONS)
            raise

    def _choices(self, asked: _Asked, listener: Listener) -> list[Choice]:
        """`n` choices for each prompt, in the order of their indices. Raises ApiError."""
        params, info = asked.params, asked.served.info
        self._metrics.for_model(info.name).observe(names.REQUEST_N, params.n)
        choices: list[Choice] = []
        for tokens in asked.prompts:
            prompt = Prompt(tuple(tokens), params.cache_salt)
            for number in range(params.n):
                sampling = params.sampling(number, len(tokens), info.max_model_len)
                work = Work(f"{asked.id}-{len(choices)}", prompt, sampling)
                choices.append(self._choice(len(choices), work, asked, listener))
        return choices

    def _choice(self, index: int, work: Work, asked: _Asked, listener: Listener) -> Choice:
        detokenizer = asked.served.tokenizer.detokenizer(work.prompt.tokens)
        return Choice(
            index=index,
            work=work,
            dispatch=Dispatch(work, self._control.fleet, self._config.limits, self._clock()),
            text=ChoiceText(detokenizer, asked.params.stops, work.sampling.min_tokens),
            timeline=Timeline(asked.arrived),
            listener=listener,
            metrics=self._metrics.for_model(asked.served.info.name),
        )


async def _tokens(prompt: str | list[int], served: _Served) -> list[int]:
    """One prompt of a completion as tokens. Raises ApiError."""
    tokens = await served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if not tokens:
        raise bad_request("The prompt is empty.", "prompt")
    limit = served.info.max_model_len
    if len(tokens) >= limit:  # before work is spent on the others
        raise context_too_long(limit, len(tokens), 0, "prompt")
    check_tokens(tokens, served.info)
    return tokens
