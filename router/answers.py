"""From a valid request to its answer: choices, generation, response, and what is kept of it.

A handler is cancelled when its client disconnects; `cancel` in its `finally` frees both nodes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from aiohttp import web

from router.asked import Asked
from router.choice import Choice
from router.choice_maker import ChoiceMaker
from router.chunks import AnswerFormat, FormatMaker
from router.config import RouterConfig
from router.event_stream import EventStream
from router.generation import Collected, Streamed
from router.metrics import RouterMetrics
from router.request_log import RequestLog, RequestRecord
from router.requests import Requests
from router.server_timing import timing_headers
from telemetry import metrics as names


class Answers:
    """Answers what clients ask for.

    Args:
        charge: told how many output tokens an answer took.
    """

    def __init__(
        self,
        config: RouterConfig,
        requests: Requests,
        choices: ChoiceMaker,
        metrics: RouterMetrics,
        log: RequestLog,
        charge: Callable[[web.Request, int], None],
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._requests = requests
        self._choices = choices
        self._metrics = metrics
        self._log = log
        self._charge = charge
        self._clock = clock

    async def answer(
        self,
        request: web.Request,
        asked: Asked,
        make_format: FormatMaker,
    ) -> web.StreamResponse:
        """One answer, or a stream of events. Raises ApiError."""
        params = asked.params
        format = make_format(
            asked.id,
            asked.served.name,
            int(time.time()),
            asked.details(make_format.bytes_prefix),
            params.include_usage,
        )
        if params.stream:
            return await self._stream(request, asked, format)
        return await self._whole(request, asked, format)

    async def _whole(
        self, request: web.Request, asked: Asked, format: AnswerFormat
    ) -> web.Response:
        params = asked.params
        num_best = None if params.best_of is None else params.n
        generation = Collected(self._requests, format, num_best=num_best)
        choices = self._choices.of(asked, generation)
        record = self._begin_record(asked, format, choices)
        try:
            generation.start(choices, params.num_choices)
            answer = await generation.answer()
            await format.settled()
            return web.Response(
                body=answer,
                content_type="application/json",
                charset="utf-8",
                headers=timing_headers(record),
            )
        finally:
            generation.cancel()
            self._charge(request, generation.usage().num_output_tokens)
            self._finish_record(record, asked)

    async def _stream(
        self, request: web.Request, asked: Asked, format: AnswerFormat
    ) -> web.StreamResponse:
        params = asked.params
        generation = Streamed(
            self._requests,
            format,
            include_usage=params.include_usage,
            continuous_usage=params.continuous_usage,
            max_buffered=self._config.stream_buffer_bytes,
            on_overflow=lambda: self._give_up(request),
        )
        choices = self._choices.of(asked, generation)
        record = self._begin_record(asked, format, choices)
        try:
            generation.start(choices, params.num_choices)
            return await self._write_events(request, generation, format, record)
        finally:
            generation.cancel()
            self._charge(request, generation.usage().num_output_tokens)
            self._finish_record(record, asked)

    async def _write_events(
        self,
        request: web.Request,
        generation: Streamed,
        format: AnswerFormat,
        record: RequestRecord,
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
                await format.settled()
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
        self, asked: Asked, format: AnswerFormat, choices: Sequence[Choice]
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

    def _finish_record(self, record: RequestRecord, asked: Asked) -> None:
        self._log.finish(record, self._clock())
        longest = max(choice.num_output_tokens for choice in record.choices)
        model = self._metrics.for_model(asked.served.info.name)
        model.observe(names.REQUEST_LONGEST_GENERATION, longest)
