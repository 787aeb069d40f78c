"""The main path of a client request: body, prompt tokens, choices, answer.

    handler ─▶ parse ─▶ tokenize ─▶ Generation.start ─▶ events or one answer

A handler is cancelled when its client disconnects; `cancel` in its `finally` frees both nodes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from aiohttp import web

from router.anthropic.format import MessagesFormat
from router.api import CompletionBody, parse_completion
from router.api_chat import ChatBody, parse_chat
from router.checks import check_num_pairs
from router.choice import Choice, Listener
from router.choice_text import ChoiceText, TextRules
from router.chunks import AnswerFormat, ChatFormat, CompletionFormat, TokenDetails
from router.config import RouterConfig
from router.control import Control
from router.dispatch import Dispatch
from router.echo import Echo
from router.errors import ApiError, model_not_found, unavailable
from router.event_stream import EventStream
from router.generation import Collected, Streamed
from router.logprobs import TokenNames
from router.metrics import RouterMetrics
from router.params import GenerationParams, generation_params
from router.prompts import ReadyPrompt, chat_prompt, completion_prompt
from router.request_log import RequestLog, RequestRecord
from router.requests import Requests
from router.server_timing import timing_headers
from router.structured import Structured
from router.tokenizer import Tokenizer
from router.tools.choose import Reading, call_format
from router.trace import ChoiceTrace
from router.work import Prompt, Work
from telemetry import metrics as names
from telemetry.timeline import Timeline
from wire.messages import ModelInfo


@dataclass(frozen=True, slots=True)
class Served:
    """The model that a request found when it arrived."""

    info: ModelInfo
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that was found valid, before any of its choices exists."""

    id: str
    prompts: list[ReadyPrompt]
    params: GenerationParams
    served: Served
    timeline: Timeline


class Serving:
    """Answers completions and chat.

    Args:
        charge: told how many tokens a request uses, its prompt's first.
    """

    def __init__(
        self,
        config: RouterConfig,
        control: Control,
        metrics: RouterMetrics,
        log: RequestLog,
        charge: Callable[[web.Request, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._control = control
        self._metrics = metrics
        self._log = log
        self._charge = charge
        self._clock = clock
        self._structured = Structured()
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
        asked = _Asked(uuid.uuid4().hex, prompts, params, served, timeline)
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
        make_format: type[ChatFormat | MessagesFormat],
    ) -> web.StreamResponse:
        """A conversation, in whatever dialect it came."""
        served = self.served(body.model)
        params = await self._params(body, served)
        with self._metrics.tokenize.time():
            prompt = await chat_prompt(body, params, served.tokenizer, served.info)
        params = replace(params, reading=self._reading(params, prompt, served))
        asked = _Asked(uuid.uuid4().hex, [prompt], params, served, timeline)
        return await self._generate(request, asked, make_format)

    async def _params(self, body: CompletionBody | ChatBody, served: Served) -> GenerationParams:
        params = generation_params(body, served.info, self.limits)
        await self._structured.check(params.grammar, params.grammar_param)
        return params

    def _reading(self, params: GenerationParams, prompt: ReadyPrompt, served: Served) -> Reading:
        """How answers to this prompt are to be understood."""
        config, use, tokenizer = self._config, params.tools, served.tokenizer
        if params.grammar:
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

    def plain_choice(
        self,
        work: Work,
        served: Served,
        timeline: Timeline,
        listener: Listener,
        *,
        index: int,
        priority: int,
    ) -> Choice:
        """A choice without text."""
        return Choice(
            index=index,
            work=work,
            dispatch=Dispatch(work, self._control.fleet, self._config.limits, self._clock()),
            text=ChoiceText(served.tokenizer.detokenizer((), False), TextRules()),
            trace=ChoiceTrace(work.request, index, work.num_tokens, timeline.copy()),
            listener=listener,
            metrics=self._metrics.for_model(served.info.name),
            priority=priority,
        )

    # ------------------------------------------------------------ generation

    async def _generate(
        self,
        request: web.Request,
        asked: _Asked,
        make_format: type[CompletionFormat | ChatFormat | MessagesFormat],
    ) -> web.StreamResponse:
        self.num_requests += 1
        try:
            return await self._answer(request, asked, make_format)
        finally:
            self.num_requests -= 1

    async def _answer(
        self,
        request: web.Request,
        asked: _Asked,
        make_format: type[CompletionFormat | ChatFormat | MessagesFormat],
    ) -> web.StreamResponse:
        params = asked.params
        asked.timeline.tokenized(self._clock())
        self.check_room(len(asked.prompts) * params.num_choices, asked.served)
        self._charge(request, sum(len(prompt.tokens) for prompt in asked.prompts))
        format = make_format(
            asked.id,
            asked.served.name,
            int(time.time()),
            _details(asked, make_format.bytes_prefix),
            params.include_usage,
        )
        if params.stream:
            return await self._stream(request, asked, format)
        num_best = None if params.best_of is None else params.n
        generation = Collected(self._control.requests, format, num_best=num_best)
        choices = self._choices(asked, generation)
        record = self._begin_record(asked, format, choices)
        try:
            generation.start(choices, params.num_choices)
            return web.Response(
                body=await generation.answer(),
                content_type="application/json",
                charset="utf-8",
                headers=timing_headers(record),
            )
        finally:
            generation.cancel()
            self._charge(request, generation.usage().num_output_tokens)
            self._finish_record(record, asked)

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
        record = self._begin_record(asked, format, choices)
        try:
            generation.start(choices, params.num_choices)
            return await self._write_events(request, generation, record)
        finally:
            generation.cancel()
            self._charge(request, generation.usage().num_output_tokens)
            self._finish_record(record, asked)

    async def _write_events(
        self, request: web.Request, generation: Streamed, record: RequestRecord
    ) -> web.StreamResponse:
        """The status is sent with the first event, so that an earlier error has its own.

        It does not wait for ever: a proxy may give up a connection on which nothing moves.
        """
        try:
            async with asyncio.timeout(self._config.hold_headers_s):
                events = await generation.next_events()
        except TimeoutError:
            events = b""
        response = EventStream(timing_headers(record), with_event=bool(events))
        with self._metrics.streams.track_inprogress():
            await response.prepare(request)
            if not events:
                generation.status_sent()
                events = await generation.next_events()
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

    def _begin_record(
        self, asked: _Asked, format: AnswerFormat, choices: Sequence[Choice]
    ) -> RequestRecord:
        record = RequestRecord(
            id=asked.id,
            response_id=format.id,
            model=asked.served.name,
            stream=asked.params.stream,
            arrived_at=time.time() - (self._clock() - asked.timeline.arrived),
            choices=[choice.trace for choice in choices],
        )
        self._log.begin(record)
        return record

    def _finish_record(self, record: RequestRecord, asked: _Asked) -> None:
        self._log.finish(record, self._clock())
        longest = max(choice.num_output_tokens for choice in record.choices)
        model = self._metrics.for_model(asked.served.info.name)
        model.observe(names.REQUEST_LONGEST_GENERATION, longest)

    def _choices(self, asked: _Asked, listener: Listener) -> list[Choice]:
        """All choices of each prompt, in the order of their indices. Raises ApiError."""
        params, info = asked.params, asked.served.info
        self._metrics.for_model(info.name).observe(names.REQUEST_N, params.n)
        choices: list[Choice] = []
        for ready in asked.prompts:
            prompt = Prompt(tuple(ready.tokens), params.cache_salt)
            for number in range(params.num_choices):
                sampling = params.sampling(number, len(ready.tokens), info.max_model_len)
                check_num_pairs(len(ready.tokens), sampling)
                work = Work(f"{asked.id}-{len(choices)}", prompt, sampling)
                choices.append(self._choice(len(choices), work, ready.echo, asked, listener))
        return choices

    def _choice(
        self, index: int, work: Work, echo: Echo | None, asked: _Asked, listener: Listener
    ) -> Choice:
        params = asked.params
        detokenizer = asked.served.tokenizer.detokenizer(
            work.prompt.tokens, params.skip_special_tokens
        )
        return Choice(
            index=index,
            work=work,
            dispatch=Dispatch(work, self._control.fleet, self._config.limits, self._clock()),
            text=ChoiceText(detokenizer, params.text_rules),
            trace=ChoiceTrace(work.request, index, work.num_tokens, asked.timeline.copy()),
            listener=listener,
            metrics=self._metrics.for_model(asked.served.info.name),
            echo=echo,
            priority=params.body.priority or 0,
            parser=params.reading.make_parser(),
        )


def _details(asked: _Asked, bytes_prefix: str) -> TokenDetails:
    params = asked.params
    as_ids = bool(params.body.return_tokens_as_token_ids)
    return TokenDetails(
        names=TokenNames(asked.served.tokenizer, as_ids, bytes_prefix),
        logprobs=params.logprobs,
        prompt_logprobs=params.body.prompt_logprobs,
        token_ids=params.return_token_ids,
    )
