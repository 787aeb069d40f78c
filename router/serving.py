"""The main path of a client request: body, prompt tokens, choices, answer.

    handler ─▶ parse ─▶ tokenize ─▶ Answers: choices ─▶ generation ─▶ events or one answer

A handler is cancelled when its client disconnects, and with it all that it waits for.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from aiohttp import web

from router.answers import Answers
from router.api import CompletionBody, parse_completion
from router.api_chat import ChatBody, parse_chat
from router.asked import Asked, Served
from router.choice_maker import ChoiceMaker
from router.chunks import ChatFormat, CompletionFormat, FormatMaker
from router.config import RouterConfig
from router.control import Control
from router.errors import ApiError, model_not_found, unavailable
from router.metrics import RouterMetrics
from router.params import GenerationParams, generation_params, needs_grammar
from router.prompts import ReadyPrompt, chat_prompt, completion_prompt
from router.request_log import RequestLog
from router.requests import Requests
from router.structured import WHITESPACE, Structured, bounded
from router.tokenizer import Tokenizer
from router.tools.choose import Reading, call_format
from router.tools.strict import strict_grammar
from telemetry import metrics as names
from telemetry.timeline import Timeline


class Serving:
    """Answers completions and chat.

    Args:
        charge: told how many tokens a request uses, its prompt's first.
    """

    def __init__(
        self,
        config: RouterConfig,
        control: Control,
        choices: ChoiceMaker,
        metrics: RouterMetrics,
        log: RequestLog,
        charge: Callable[[web.Request, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._control = control
        self._metrics = metrics
        self._charge = charge
        self._clock = clock
        self._structured = Structured()
        self.choices = choices
        self._answers = Answers(config, control.requests, choices, metrics, log, charge, clock)
        self.limits = config.server_limits
        self.pooling = config.pooling  # of embeddings
        self.closing = False
        self.num_requests = 0  # that are being answered

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that clients may use; the first one stands in answers."""
        model = self._control.fleet.model
        return self._config.served_model_name or (() if model is None else (model.name,))

    # ------------------------------------------------------------ handlers

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        timeline = self.new_timeline()
        body = parse_completion(await self.read_timed(request, timeline))
        served = self.served(body.model)
        params = await self._params(body, served)
        with self._metrics.tokenize.time():
            prompts = [
                await completion_prompt(prompt, params, served.tokenizer, served.info)
                for prompt in body.prompt
            ]
        asked = Asked(uuid.uuid4().hex, prompts, params, served, timeline)
        return await self._generate(request, asked, CompletionFormat)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        timeline = self.new_timeline()
        body = parse_chat(await self.read_timed(request, timeline))
        return await self.answer_chat(request, body, timeline, ChatFormat)

    async def answer_chat(
        self,
        request: web.Request,
        body: ChatBody,
        timeline: Timeline,
        make_format: FormatMaker,
    ) -> web.StreamResponse:
        """A conversation, in whatever dialect it came."""
        served = self.served(body.model)
        params = await self._params(body, served)
        with self._metrics.tokenize.time():
            prompt = await chat_prompt(body, params, served.tokenizer, served.info)
        params = replace(params, reading=self._reading(params, prompt, served))
        asked = Asked(uuid.uuid4().hex, [prompt], params, served, timeline)
        return await self._generate(request, asked, make_format)

    async def _params(self, body: CompletionBody | ChatBody, served: Served) -> GenerationParams:
        if needs_grammar(body):  # what a client wrote is converted, which may take a while
            params = await asyncio.to_thread(generation_params, body, served.info, self.limits)
        else:
            params = generation_params(body, served.info, self.limits)
        if params.tools.strict:
            params = self._with_strict_calls(params, served.tokenizer)
        await self._structured.check(params.grammar, params.grammar_param)
        return params

    def _with_strict_calls(
        self, params: GenerationParams, tokenizer: Tokenizer
    ) -> GenerationParams:
        """Calls that need not be keep to their schemas, where a grammar can see them begin."""
        format = call_format(self._config.tool_call_parser, tokenizer.template_source)
        tags = format.hermes_tags
        if tags is None or any(map(tokenizer.is_special, (*tags, "<think>"))):
            return params
        grammar = strict_grammar(list(params.tools.strict), *tags, WHITESPACE)
        bounded(grammar, "tools", params.body.ignore_eos)
        return replace(params, grammar=grammar, grammar_param="tools")

    def _reading(self, params: GenerationParams, prompt: ReadyPrompt, served: Served) -> Reading:
        """How answers to this prompt are to be understood."""
        config, use, tokenizer = self._config, params.tools, served.tokenizer
        if params.grammar and not use.strict:
            return Reading(named=use.named, required=use.required)
        tail = tokenizer.detokenizer((), skip_special_tokens=False).push(prompt.tokens[-8:])
        began = tail.rstrip().endswith("<think>")
        thinks = config.reasoning_parser == "think" or (
            config.reasoning_parser == "auto" and (began or "<think>" in tokenizer.template_source)
        )
        calls = call_format(config.tool_call_parser, tokenizer.template_source)
        return Reading(calls if use.rendered else None, thinks=thinks, began_thinking=began)

    def new_timeline(self) -> Timeline:
        return Timeline(self._clock())

    async def read_timed(self, request: web.Request, timeline: Timeline) -> bytes:
        body = await self.read(request)
        timeline.body_read(self._clock())
        return body

    async def read(self, request: web.Request) -> bytes:
        """The whole body. Raises ApiError."""
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                return await request.read()
        except TimeoutError as error:
            raise ApiError(408, "The body did not arrive in time.") from error

    def served(self, model_name: str | None) -> Served:
        """What serves a request for this model. Raises ApiError."""
        if self.closing:
            raise unavailable("The server is shutting down.", "shutting_down")
        if model_name is not None and self.model_names and model_name not in self.model_names:
            raise model_not_found(model_name)
        model, tokenizer = self._control.fleet.model, self._control.tokenizer
        if model is None or tokenizer is None or not self._control.ready:
            raise unavailable("No node is ready to serve the model.", "no_nodes", 2.0)
        return Served(model, tokenizer, self.model_names[0])

    # ------------------------------------------------------------ for other pages

    @property
    def requests(self) -> Requests:
        return self._control.requests

    def now(self) -> float:
        return self._clock()

    @contextmanager
    def answering(self, request: web.Request, num_tokens: int) -> Iterator[None]:
        """Counts a request that nodes work on, and charges its client for the tokens."""
        self._charge(request, num_tokens)
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1

    def check_room(self, count: int, served: Served) -> None:
        """Raise ApiError (429) if the queue has no room for `count` choices."""
        try:
            self._control.requests.check_room(count)
        except ApiError:
            self._metrics.for_model(served.info.name).count(names.ADMISSION_REJECTIONS)
            raise

    # ------------------------------------------------------------ generation

    async def _generate(
        self,
        request: web.Request,
        asked: Asked,
        make_format: FormatMaker,
    ) -> web.StreamResponse:
        asked.timeline.tokenized(self._clock())
        self.check_room(len(asked.prompts) * asked.params.num_choices, asked.served)
        with self.answering(request, sum(len(prompt.tokens) for prompt in asked.prompts)):
            return await self._answers.answer(request, asked, make_format)
